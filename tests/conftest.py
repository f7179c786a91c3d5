import os
from pathlib import Path

from hypothesis import settings

from tests.quick import XLA_FLAGS

# Before jax starts: eight CPU devices so that sharding is real, and no network.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += f" {XLA_FLAGS}"  # most of a test's time is its compilation
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NPROC"] = "16"  # threads for eight devices that wait for each other
# Workers, subprocesses and the next run compile no program twice.
CACHE = Path(__file__).parent.parent / ".pytest_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ["JAXGEN_KEEP_PROGRAMS"] = "0"  # a test that has changed a function is to trace it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Nor the sources of JAX and the rest, which takes twice as long as to import them; where bytecode is unwanted it stays in here.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    os.environ["PYTHONPYCACHEPREFIX"] = str(CACHE / "bytecode")

settings.register_profile("steady", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("steady")
