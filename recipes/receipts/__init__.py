"""How a small model learns to read receipts, forms, tables and letters. Run `python -m recipes.receipts`."""
