"""params.yaml as frozen dataclasses: an unknown key or a value out of range says where it is."""

from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

# allocations at random that are measured beside a search: of its passes about a twentieth
RANDOM = 8
NO_OTHER_KEYS = ConfigDict(extra="forbid")
Count = Annotated[int, Field(ge=1, strict=True)]
BitDepth = Annotated[int, Field(ge=2, le=32, strict=True)]
Width = Annotated[int, Field(ge=1, le=32, strict=True)]
Ratio = Annotated[float, Field(ge=1, strict=True, allow_inf_nan=False)]


@dataclass(frozen=True, config=NO_OTHER_KEYS)
class Model:
    """One entry of ``models``: a network, its data, and how it is trained."""

    network: str
    data: str
    # not needed where weights, the path of a file, are given: then nothing is trained
    epochs: Count | None = None
    weights: Annotated[str, Field(min_length=1)] | None = None
    batch_size: Count = 64
    decay: Annotated[bool, Field(strict=True)] = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, config=NO_OTHER_KEYS)
class Quantize:
    """What the quantize stage tries."""

    scheme: str
    bit_depths: Annotated[list[BitDepth], Field(min_length=1)]


@dataclass(frozen=True, config=NO_OTHER_KEYS)
class Search:
    """What `quantifind.search.find_strategy` is asked for, by its names."""

    limit: dict[str, float] | None = None
    budget: dict[str, float] | None = None
    learn: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    labels: Annotated[bool, Field(strict=True)] = False
    effort: Annotated[float, Field(gt=0)] | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None
    widths: Annotated[list[Width], Field(min_length=1)] | None = None
    activation_bits: list[Width] = field(default_factory=list)
    storage: Literal["packed", "coded"] = "packed"


@dataclass(frozen=True, config=NO_OTHER_KEYS)
class Evaluate:
    """What the evaluate stage certifies."""

    limits: Annotated[list[Ratio], Field(min_length=1)]
    confidence: Annotated[float, Field(gt=0.5, lt=1, strict=True)] = 0.95
    # test examples that the report shows
    examples: Annotated[int, Field(ge=0, strict=True)] = 12


@dataclass(frozen=True, config=NO_OTHER_KEYS)
class Params:
    """The whole file."""

    model: str
    models: dict[str, Model]
    quantize: Quantize
    search: Search
    evaluate: Evaluate
    # the other runtimes that the answer is written for
    export: list[Literal["onnx", "pt2"]] = field(default_factory=list)
    # who measures, as quantifind.runtime.workers.Workers takes them
    engine: Literal["sequential", "loky", "dask"] = "sequential"
    scheduler: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0

    @property
    def entry(self) -> Model:
        """The entry of ``models`` that ``model`` selects."""
        return self.models[self.model]

    @property
    def workers(self) -> dict[str, Any]:
        """Who measures, by the arguments of `quantifind.runtime.workers.Workers`."""
        return {"engine": self.engine, "scheduler": self.scheduler}

    @property
    def search_options(self) -> dict[str, Any]:
        """The arguments of `quantifind.search.find_strategy` that the pipeline sets."""
        beside = {"confidence": self.evaluate.confidence, "seed": self.seed}
        beside |= {"proxies": True, "random": RANDOM}
        search = asdict(self.search)
        if search["effort"] is None:
            del search["effort"]  # the search has its own
        return search | beside | self.workers


def read_params(path: Path = Path("params.yaml")) -> Params:
    """The parameters in a file.

    path: of the file.
    Raises: ValueError, one line, for a file that is missing or not YAML, and naming each key that
    is unknown, missing or out of range, with what was given and what is allowed.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: missing") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        params = TypeAdapter(Params).validate_python(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(map(_explain, error.errors()))}") from error
    for name, entry in params.models.items():
        if entry.epochs is None and entry.weights is None:
            raise ValueError(f"{path}: models.{name}.epochs: missing; or give weights, a file")
    if params.model not in params.models:
        known = ", ".join(params.models)
        raise ValueError(f"{path}: model: unknown {params.model!r}: models has {known}")
    return params


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"])) or "the file"
    if error["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key; allowed are {', '.join(_known_keys(error['loc']))}"
    if error["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {error['msg']}, not {error['input']!r}"


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    sections = {"models": Model, "quantize": Quantize, "search": Search, "evaluate": Evaluate}
    section = sections[str(location[0])] if len(location) > 1 else Params
    return sorted(key.name for key in fields(section))
