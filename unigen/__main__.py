"""``python -m unigen`` is ``unigen``."""

from unigen.cli import program

if __name__ == "__main__":
    program()
