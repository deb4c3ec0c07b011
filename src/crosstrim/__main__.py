"""`python -m crosstrim`: the command line."""

from crosstrim.cli import main

if __name__ == "__main__":
    main()
