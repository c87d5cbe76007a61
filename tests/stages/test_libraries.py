from scellst_ray.stages import libraries
from scellst_ray.stages.libraries import pixel_libraries


def test_major_and_minor_version_of_each(monkeypatch):
    found = pixel_libraries()
    assert sorted(found) == ["OpenCV", "OpenSlide"]
    assert all(version.replace(".", "").isdigit() for version in found.values())
    monkeypatch.setattr(libraries.cv2, "__version__", "4.10.0.84")
    monkeypatch.setattr(libraries.openslide, "__library_version__", "4.0.1")
    assert pixel_libraries() == {"OpenCV": "4.10", "OpenSlide": "4.0"}
