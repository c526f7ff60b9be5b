"""One page per paper. A page is a function (numbers, in_channels, strides, content) -> DETR.

To add a method, write its page and name it here; nothing else needs to know of it.
"""

from dn_detr.methods.dab_deformable import dab_deformable

METHODS = {
    "dab_deformable": dab_deformable,
}
