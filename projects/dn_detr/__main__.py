"""`python -m dn_detr`: the command `dn-detr`."""

from dn_detr.cli.main import main

if __name__ == "__main__":
    main()
