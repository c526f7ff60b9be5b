"""The commands of `dn-detr`, a file each."""
