"""The command `dn-detr`: one module per command, each a thin face on functions of the package."""
