"""Run the command line: `python -m broadcache`."""

from .cli import main

if __name__ == "__main__":
    main()
