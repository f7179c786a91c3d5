"""A DiT-XL-sized transformer on COCO's captions, 128 x 128 pixels, for a v5e pod slice of 256 chips.

    python train.py --config=configs/coco_dit_xl_tpu.py --workdir=gs://BUCKET/coco --config.data.dir=gs://BUCKET/data

Nobody has run it: it is meant as the place to start from. `python -m jaxgen.parallel.plan --config=… --topology=v5e:16x16` says
what it takes; on four chips (v5e:2x2, train.batch_size=128) it is 9.7 GiB of 16 a chip, 315 ms a step, 46.7% MFU.
Preparing tfds:coco_captions asks for the extra `tf` once.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.transformer import Transformer
from jaxgen.parallel.mesh import MeshConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Flow(
            # Heads of 128 fill the matrix unit and halve what attention moves; products are kept for the backward pass, the
            # rest is computed again; a loop over the blocks compiles in a fraction of the time.
            network=Transformer(patch=8, width=1152, depth=28, head_dim=128, refiner=2, remat="dots", scan=True),
            time_mean=0.0,
            sample_shift=3.0,
        ),
        data=DataConfig(name="tfds:coco_captions", image_size=128, threads=32, flip=False, crop=True),
        mesh=MeshConfig(data=-1, fsdp=4),
        train=TrainConfig(steps=400_000, batch_size=4096, ema_decay=0.9999, checkpoint_every=5000),
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-4, schedule="trapezoid", warmup_steps=2000),
        sample=SampleConfig(
            prompts=("a brown dog lying on a bed", "a red bus on a city street", "a plate of food", "a man riding a wave"),
            num_images=4,
            num_steps=50,
            every=5000,
        ),
        eval=EvalConfig(every=10_000, count=4096),
    )
