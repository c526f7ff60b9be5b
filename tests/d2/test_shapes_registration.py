"""The synthetic dataset in Detectron2's catalogs."""

from detectron2.data import DatasetCatalog, MetadataCatalog

from dn_detr.d2.data.catalog import register_shapes
from dn_detr.datasets import shape_drawing, shapes


def _forget_shapes():
    for name in ("shapes_train", "shapes_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_registered_shapes_are_drawn_on_first_use(tmp_path, monkeypatch):
    _forget_shapes()
    monkeypatch.setattr(shapes, "NUM_IMAGES", {"train": 4, "val": 3})
    register_shapes(tmp_path)
    register_shapes(tmp_path)
    try:
        assert MetadataCatalog.get("shapes_val").thing_classes == list(shape_drawing.CLASSES)
        assert list(tmp_path.iterdir()) == []
        assert len(DatasetCatalog.get("shapes_val")) == 3
        record = DatasetCatalog.get("shapes_train")[0]
        assert len(DatasetCatalog.get("shapes_train")) == 4
        assert (tmp_path / "shapes_train/images/000001.jpg").samefile(record["file_name"])
    finally:
        _forget_shapes()
        register_shapes()
