"""`python -m taskd`."""

from taskd.cli.main import main

if __name__ == "__main__":
    main()
