"""The entry of `python -m jaxpack`, which is the command `jaxpack`."""

from jaxpack.cli import main

if __name__ == "__main__":
    main()
