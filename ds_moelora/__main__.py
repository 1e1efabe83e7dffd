"""`python -m ds_moelora COMMAND ...`; `--help` lists the commands."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
