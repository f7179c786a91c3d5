import json
import subprocess
import sys

HEAVY = ("jax", "flax", "orbax", "grain", "tensorflow_datasets", "transformers", "torch", "tensorflow", "cv2", "optax")


def loaded_by(statement):
    code = f"import sys, json; {statement}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    return set(json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout))


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import jaxgen") == set()


def test_drawing_needs_no_training_package():
    assert loaded_by("import jaxgen.text, jaxgen.model") <= {"jax", "flax", "optax"}  # flax itself imports optax
