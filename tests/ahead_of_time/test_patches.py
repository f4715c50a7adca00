"""What is replaced in other libraries: that the names are there, and are put back."""

import sys
import types
from importlib import metadata

import gin
import jax
import pytest

from t5x_sparsity.ahead_of_time import patches

# The versions that the replacements were written for and tried with; raise them once this file
# passes with a later one.
TRIED = {"jax": ("0.10.2", "0.12.0.1"), "gin-config": ("0.5.0", "0.5.0")}
REPLACED = {
    "jax": (jax, ["devices", "local_devices", "device_count", "local_device_count"]),
    "gin-config": (gin.config, ["_print_unknown_import_message", "_LOCATION_PREFIXES"]),
}


@pytest.mark.parametrize("package", TRIED)
def test_the_names_are_there(package):
    module, names = REPLACED[package]
    gone = [name for name in names if not hasattr(module, name)]
    assert not gone, (
        f"{package} {metadata.version(package)} has no {', '.join(gone)} in {module.__name__}; "
        f"ahead_of_time/patches.py replaces it, and was written for {' to '.join(TRIED[package])}"
    )


def test_a_name_that_is_gone_is_said_so():
    module = types.ModuleType("jax")
    with pytest.raises(RuntimeError, match=r"^jax [\d.]+ has no jax.devices, .* an earlier jax"):
        with patches.replaced(module, "jax", devices=None):
            pass
    assert not hasattr(module, "devices")


def test_jax_names_the_devices_given():
    before = jax.devices, jax.local_device_count
    with pytest.raises(KeyError), patches.jax_devices(["a", "b"], ["a"]):
        assert jax.devices() == jax.devices("tpu") == ["a", "b"]
        assert jax.local_devices(process_index=0) == ["a"]
        assert (jax.device_count(), jax.local_device_count()) == (2, 1)
        raise KeyError
    assert (jax.devices, jax.local_device_count) == before


def test_gin_tells_of_missing_modules_and_forgets_folders():
    found, folders = [], list(gin.config._LOCATION_PREFIXES)
    with patches.gin_missing_imports(found), patches.gin_search_paths():
        gin.add_config_file_search_path("/somewhere")
        gin.parse_config("import no_such_package.tasks", skip_unknown=True)
        assert gin.config._LOCATION_PREFIXES == [*folders, "/somewhere"]
    assert found == ["no_such_package.tasks"] and gin.config._LOCATION_PREFIXES == folders


def test_the_function_is_that_of_the_script():
    def train():
        pass

    script = sys.modules["__main__"]
    assert not hasattr(script, "train")
    with patches.main_train(train):
        assert script.train is train and train.__module__ == "__main__"
    assert not hasattr(script, "train")
