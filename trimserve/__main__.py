"""`python -m trimserve` is `trimserve`."""

from trimserve.cli import main

if __name__ == "__main__":
    main()
