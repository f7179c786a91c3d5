"""A transformer of three billion parameters on pictures of 256 x 256, for TPU slices of 16 chips and more.

    python train.py --config=configs/dit_3b_tpu.py --workdir=gs://BUCKET/dit_3b --config.data.dir=gs://BUCKET/data

Nobody has run it: it is meant as the place to start from, with a larger set of pictures than COCO's. Planned for v5e:16x16
(256 chips, bfloat16, train.batch_size=8192, 32 pictures a chip; docs/scaling.md): 9.2 GiB of 16 a chip, 1,410 ms a step,
50.4% MFU, no all-to-all.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.transformer import Transformer
from jaxgen.parallel.mesh import MeshConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Flow(
            network=Transformer(patch=16, width=2560, depth=28, head_dim=128, refiner=2, remat=True, scan=True),
            time_mean=0.0,
            sample_shift=3.0,
        ),
        data=DataConfig(name="tfds:coco_captions", image_size=256, threads=32, flip=False, crop=True),
        mesh=MeshConfig(data=-1, fsdp=16),
        train=TrainConfig(steps=400_000, batch_size=2048, ema_decay=0.9999, checkpoint_every=5000),
        optimizer=OptimizerConfig(name="adamw", learning_rate=1e-4, schedule="trapezoid", warmup_steps=5000),
        sample=SampleConfig(
            prompts=("a brown dog lying on a bed", "a red bus on a city street", "a plate of food", "a man riding a wave"),
            num_images=4,
            num_steps=50,
            every=5000,
        ),
        eval=EvalConfig(every=10_000, count=4096),
    )
