"""Settings of the commands that train networks.

The modules that fit heads and encoders load torch. They are imported in methods, because the help
of a command reads only these classes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scellst_ray.core.numbers import check_numbers

if TYPE_CHECKING:
    from scellst_ray.models.mil.fit import FitConfig
    from scellst_ray.stages.supervision import Rules
    from scellst_ray.training.moco_loop import Recipe


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """Settings that `train` and `crossvalidate` share: which spots supervise, how to fit a head."""

    min_gene_counts: int = 200
    """Counts that a gene needs over a slide to pass the filters. Lower it for shallow data."""
    min_spot_share: float = 0.1
    """Share (0 to 1) of a slide's spots in which a gene must occur to pass the filters."""
    min_spot_counts: int = 20
    """Counts that a spot needs over the genes that pass. Other spots are left out."""
    keep_mitochondrial: bool = False
    """Let genes whose name begins with MT- pass the filters."""
    check_alignment: bool = True
    """Refuse slides whose spots do not lie on their tissue. Turn it off for slides that are
    correct but have little tissue."""
    predictor: Literal["ours", "published"] = "ours"
    """Network of the head: `ours` as in sCellST's paper, `published` as in its code (LeakyReLU,
    dropout and softplus)."""
    ensemble: int = 1
    """Number of networks that are trained together, 1 or more. With 2 or more, each cell has a
    standard deviation too, and stores 512 bytes per network."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW. Raise it if the loss falls slowly, lower it if the loss jumps."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    batch_spots: int = 128
    """Number of spots in a step, over all workers."""
    max_epochs: int = 400
    """Highest number of epochs. Early stopping usually ends training before."""
    patience: int = 20
    """Number of epochs without a better validation loss after which training stops."""
    val_share: float = 0.2
    """Share (0 to 1) of each training slide's spots that are held out for early stopping."""

    def rules_for(self, fit: "FitConfig") -> "Rules":
        """Return the rules by which spots become supervision of such a fit."""
        from scellst_ray.spots.panel import CountFilter  # noqa: PLC0415 - not for help
        from scellst_ray.stages.supervision import Rules  # noqa: PLC0415 - not for help

        limits = CountFilter(
            min_gene_counts=self.min_gene_counts,
            min_spot_share=self.min_spot_share,
            min_spot_counts=self.min_spot_counts,
            drop_prefix="" if self.keep_mitochondrial else "MT-",
        )
        counts = fit.formula().counts
        return Rules(limits, with_counts=counts, check_alignment=self.check_alignment)

    def fit_with(self, loss: str, seed: int) -> "FitConfig":
        """Return the settings of fitting a head with a loss and a seed."""
        from scellst_ray.models.mil.fit import FitConfig  # noqa: PLC0415 - loads torch

        return FitConfig(
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            batch_spots=self.batch_spots,
            max_epochs=self.max_epochs,
            patience=self.patience,
            seed=seed,
            val_share=self.val_share,
            predictor=self.predictor,
            loss=loss,  # type: ignore[arg-type] # FitConfig checks it
            ensemble=self.ensemble,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(HeadSettings):
    """Train a head on CELLS and spots to predict expression (multiple-instance learning)."""

    manifest: str
    """Manifest of slides with spots: CSV or Parquet with slide_id, uri, spots and, optionally,
    spot_diameter_um. `spots` names a Space Ranger outs folder, an .h5ad file, or the counts TSV of
    an ST array with its spot_positions."""
    cells: str
    """Run folder of `extract` that holds the cells of these slides."""
    out: str
    """Folder to write: the head, its bags (the cells of each spot) and its report."""
    slides: list[str] | None = None
    """Comma-separated slide_ids to train on. By default all rows with spots."""
    genes: str = "variable:250"
    """Gene panel, chosen on the training slides: `variable:N` (variance of log counts), `hvg:N`
    (seurat_v3 of scanpy) or `svg:N` (Moran's I). Or `markers:FILE`, a comma-separated list of
    genes, or a file that lists them."""
    loss: Literal["mse", "nb", "nb_total"] = "mse"
    """`mse`: squared error of scaled log-normalised expression. `nb` and `nb_total`: negative
    binomial likelihood of raw counts, by mean and dispersion or by total count and logits."""
    seed: int = 0
    """Seed of weights, split and order of spots."""
    workers: int = 1
    """Number of training processes. The result does not depend on it, except for the dropout of
    `--predictor published`."""
    max_failures: int = 3
    """Number of times that dead workers are restarted from the last epoch before training fails."""
    memory_gb: float = 8.0
    """Size in GB up to which embeddings stay in memory. Larger ones are read batch by batch from a
    file in each worker's temporary folder, which needs that space. The result is the same."""
    cpus_per_worker: int | None = None
    """Number of CPUs of each worker. By default the CPUs are divided evenly, at most 4 each."""
    gpus: bool | None = None
    """Use one GPU for each worker. By default on if the cluster has enough GPUs."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        from scellst_ray.spots.selection import parse_rule  # noqa: PLC0415 - not for help

        check_numbers(self, {"ensemble": 1, "workers": 1, "cpus_per_worker": 1})
        self.fit_config()
        parse_rule(self.genes)
        self.rules()

    def rules(self) -> "Rules":
        """Return the rules by which spots become supervision."""
        return self.rules_for(self.fit_config())

    def fit_config(self) -> "FitConfig":
        """Return the settings of fitting the head."""
        return self.fit_with(self.loss, self.seed)


@dataclass(frozen=True, kw_only=True)
class CrossvalidateConfig(HeadSettings):
    """Train heads on some slides, score them on other slides, over panels, losses and seeds."""

    manifest: str
    """Manifest of slides with spots, as `train` takes it. `--protocol leave-one-patient-out` also
    needs its column patient_id."""
    cells: str
    """Run folder of `extract` that holds the cells of these slides."""
    out: str
    """Folder to write: the trials and the tables of results. The same command on it runs only the
    trials that are missing."""
    protocol: Literal["leave-one-slide-out", "leave-one-patient-out", "single-slide"] = (
        "leave-one-slide-out"
    )
    """Rule that splits slides into training and test. `single-slide` trains on one slide and scores
    each other one."""
    slides: list[str] | None = None
    """Comma-separated slide_ids to use. By default all rows with spots."""
    panels: list[str] | None = None
    """Comma-separated rules of gene panels, as `--genes` of `train` takes them. Each is applied to
    the training slides of a trial. By default variable:250."""
    losses: list[str] | None = None
    """Comma-separated losses: mse, nb and nb_total, as `--loss` of `train`. By default mse."""
    num_seeds: int = 1
    """Number of seeds (0, 1, ...) of weights, split and order. Each seed is a trial of its own."""
    colour: bool = True
    """Compare with a ridge regression on colours alone. It reads the image around all spots once.
    Turn it off where slides are not reachable."""
    bootstraps: int = 200
    """Number of draws of spots for the 95 % intervals of each trial. 0 leaves intervals out."""
    cpus_per_trial: int = 1
    """Number of CPUs of each trial. 1 is the most efficient while trials outnumber CPUs."""
    gpus_per_trial: float = 0.0
    """Number of GPUs of each trial. 0.25 runs four trials on one GPU, 0 runs on CPUs."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        from scellst_ray.spots.selection import parse_rule  # noqa: PLC0415 - not for help

        check_numbers(self, {"ensemble": 1, "num_seeds": 1, "cpus_per_trial": 1})
        for panel in self.all_panels():
            parse_rule(panel)
        for loss in self.all_losses():
            fit = self.fit_with(loss, 0)
            assert fit.loss == loss
            self.rules_for(fit)

    def all_panels(self) -> list[str]:
        """Return the rules of gene panels."""
        return self.panels or ["variable:250"]

    def all_losses(self) -> list[str]:
        """Return the losses."""
        return self.losses or ["mse"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretrain an encoder on crops of cells by contrastive learning (MoCo v3)."""

    crops: list[str]
    """Comma-separated run folders of `extract --crops N`."""
    out: str
    """Folder to write: the encoder, its checkpoints and its log. The same command on it resumes
    from the latest checkpoint."""
    arch: str = "resnet50"
    """Architecture of the encoder: resnet18, resnet34, resnet50 or timm:NAME."""
    init: str = "random"
    """Weights to begin with: `random`, `imagenet` (downloaded by torchvision) or an encoder
    file."""
    epochs: int = 150
    """Number of passes over the crops."""
    warmup_epochs: int = 10
    """Number of first epochs in which the learning rate rises to its full value."""
    batch: int = 4096
    """Number of crops in a step, over all workers. The result depends on it."""
    base_lr: float = 0.6
    """Learning rate for a batch of 256 crops. The rate used grows in proportion to the batch."""
    optimiser: Literal["lars", "adamw"] = "lars"
    """Optimiser: lars for residual networks, adamw for others. adamw needs a base_lr of about
    1e-4 to 1e-3."""
    weight_decay: float = 1e-6
    """Weight decay of the optimiser."""
    temperature: float = 1.0
    """Temperature of the contrastive loss. A lower one weighs similar crops more."""
    momentum: float = 0.99
    """Share (0 to 1) of its weights that the momentum encoder keeps at each step."""
    momentum_cosine: bool = False
    """Let the momentum rise to 1 along a cosine over the run."""
    projector_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""
    out_dim: int = 256
    """Length of the vectors that the loss compares."""
    flips: bool = False
    """Mirror views left-right and top-bottom, each with probability 1/2. Off in the published
    recipe."""
    stain_jitter: float = 0.0
    """Share s by which the stains of views vary. Hematoxylin and eosin are each scaled by a factor
    from 1 - s to 1 + s and shifted by -s to s. 0 leaves stains alone."""
    hue: float = 0.2
    """Largest turn of the hue of views, in whole turns of the colour circle, in both directions."""
    min_crop_scale: float = 0.6
    """Smallest area of a random view, as a share (0 to 1) of the crop."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the networks. `auto` takes bfloat16 where the driver's device has it, or where
    `--gpus` is given. Otherwise it takes float32."""
    recompute: bool = False
    """Recompute activations in the backward pass, for residual networks. It saves memory and takes
    a third more time."""
    seed: int = 0
    """Seed of weights, order of crops and augmentation."""
    workers: int = 1
    """Highest number of training processes. The result does not depend on it, except for
    rounding."""
    min_workers: int | None = None
    """Least number of workers with which training continues when nodes are lost. Workers are added
    when nodes return. By default training waits for all workers."""
    crops_at_once: int | None = None
    """Number of crops that a worker's device holds. A larger share of the batch is computed in
    parts. Lower it if memory does not suffice."""
    cpus_per_worker: int | None = None
    """Number of CPUs of each worker. By default the CPUs are divided evenly, at most 8 each."""
    gpus: bool | None = None
    """Use one GPU for each worker. By default on if the cluster has enough GPUs."""
    checkpoint_steps: int = 500
    """Number of steps between checkpoints. Each epoch ends with a checkpoint in any case."""
    keep_best: int = 2
    """Number of epochs with the lowest training loss whose checkpoints are kept, in addition to
    the latest."""
    max_failures: int = 8
    """Number of times that workers may die before the run fails. Training resumes from the latest
    checkpoint."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        least = {"epochs": 1, "batch": 2, "workers": 1, "min_workers": 1}
        least |= {"crops_at_once": 2, "cpus_per_worker": 1, "checkpoint_steps": 1, "keep_best": 1}
        least |= {"projector_dim": 1, "out_dim": 1}
        check_numbers(self, least, positive=("base_lr", "temperature", "min_crop_scale"))
        for name in ("momentum", "hue", "stain_jitter", "min_crop_scale"):
            if getattr(self, name) > 1:
                message = f"{name} is {getattr(self, name)}; it must be at most 1"
                raise ValueError(message)
        if not self.crops:
            message = "crops is empty; name at least one run folder of `extract --crops`"
            raise ValueError(message)
        if self.warmup_epochs >= self.epochs:
            message = (
                f"warmup_epochs is {self.warmup_epochs} of {self.epochs} epochs; give fewer "
                "warm-up epochs than epochs"
            )
            raise ValueError(message)
        if self.min_workers is not None and self.min_workers > self.workers:
            message = f"min_workers is {self.min_workers}; give at most workers, {self.workers}"
            raise ValueError(message)
        self.recipe("float32")

    def recipe(self, precision: str) -> "Recipe":
        """Return the settings that decide the result."""
        from scellst_ray.models.moco.augment import AugmentConfig  # noqa: PLC0415 - loads torch
        from scellst_ray.models.moco.network import MocoConfig  # noqa: PLC0415 - loads torch
        from scellst_ray.training.moco_loop import Recipe  # noqa: PLC0415 - loads Ray

        moco = MocoConfig(
            self.projector_dim, self.out_dim, self.temperature, self.momentum, self.momentum_cosine
        )
        augment = AugmentConfig(
            flips=self.flips,
            stain_jitter=self.stain_jitter,
            hue=self.hue,
            crop_scale=(self.min_crop_scale, 1.0),
        )
        return Recipe(
            arch=self.arch,
            moco=moco,
            augment=augment,
            batch=self.batch,
            epochs=self.epochs,
            warmup_epochs=self.warmup_epochs,
            base_lr=self.base_lr,
            optimiser=self.optimiser,
            weight_decay=self.weight_decay,
            precision=precision,
            recompute=self.recompute,
            seed=self.seed,
        )
