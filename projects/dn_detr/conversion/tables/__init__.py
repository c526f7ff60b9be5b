"""The tables of each page: every page may have several, one for each source of checkpoints."""

from dn_detr.conversion.tables import dab_detr

TABLES = {
    "dab_detr": dab_detr.TABLES,
}
