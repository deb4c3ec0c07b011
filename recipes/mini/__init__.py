"""How the embedded checkpoint "mini" is made: data, training, evaluation. Run `python -m recipes.mini`."""
