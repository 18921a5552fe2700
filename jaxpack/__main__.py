"""`python -m jaxpack`: the same as the command `jaxpack`."""

from jaxpack.cli import main

if __name__ == "__main__":
    main()
