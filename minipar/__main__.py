"""`python -m minipar` is the `minipar` command."""

from minipar.cli import main

if __name__ == "__main__":
    main()
