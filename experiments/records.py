"""What is stored of a cell, and the Parquet table that cells become.

One record is one repeat of one cell. ``docs/results.md`` explains every column; ``SCHEMA_VERSION``
stands in the table's metadata.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.results import plain

RECORDS_VERSION = 1
OK, FAILED, TIMEOUT = "ok", "failed", "timeout"
_VERSION_KEY = b"sde_diffusion_records_version"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One repeat of one cell.

    Attributes:
        key: hash of all that determines the figures; see `experiments.cells`.
        kind: "cell", "fine" or "floor".
        target, sde, solver, spec, settings: what was run; ``spec`` is the solver as typed.
        guidance, scale, label: the condition; scale is gamma.
        budget: evaluations asked for; None where the solver chooses its own steps.
        steps, nfe, network_passes: steps, and evaluations and passes measured, per sample.
        grid, denoise, seed, repeat, samples: as asked for; ``samples`` in this repeat.
        seconds: wall time of sampling, ``judging_seconds`` of its metrics,
            with the references that were made for it.
        peak_bytes: most memory in use while sampling, beyond what was in use before; None where it
            cannot be known.
        batch_size: samples at a time; smaller than asked for where memory was short.
        device: where it was sampled.
        primary, truth: the metric that stands for quality, and what it compares with.
        status: "ok", "failed" or "timeout"; ``error`` says more.
        metrics: name -> value.
    """

    key: str
    kind: str
    target: str
    sde: str
    solver: str
    spec: str
    settings: Mapping[str, Any]
    guidance: str
    scale: float | None
    label: int | str | None
    budget: int | None
    steps: int | None
    grid: str | None
    denoise: bool
    seed: int
    repeat: int
    samples: int
    device: str
    batch_size: int | None = None
    nfe: float | None = None
    network_passes: float | None = None
    seconds: float | None = None
    judging_seconds: float | None = None
    peak_bytes: int | None = None
    primary: str = ""
    truth: str = ""
    status: str = OK
    error: str = ""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    interval_low: float | None = None
    interval_high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-like values."""
        values: dict[str, Any] = plain(
            {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        )
        return {"version": RECORDS_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Record:
        """From `as_dict`'s values.

        Raises:
            ValueError: it is of a newer version, or no record.
        """
        version = values.get("version")
        if not isinstance(version, int) or version > RECORDS_VERSION:
            raise ValueError(
                f"the record has version {version!r}, this program reads up to {RECORDS_VERSION}; "
                "update sde-diffusion"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except TypeError as error:
            raise ValueError(f"this is not a record of a cell: {error}") from None


def write_table(path: Path, records: Iterable[Record]) -> None:
    """Write records as one Parquet file, whole or not at all: a row each, ``metric_*`` columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_flat(record) for record in records]
    metrics = sorted({name for row in rows for name in row if name.startswith("metric_")})
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    types = {
        **dict.fromkeys(("nfe", "network_passes", "seconds", "judging_seconds", "scale"), number),
        **dict.fromkeys(("interval_low", "interval_high"), number),
        **dict.fromkeys(("budget", "steps", "seed", "repeat", "samples"), whole),
        **dict.fromkeys(("batch_size", "peak_bytes"), whole),
        "denoise": pa.bool_(),
    }
    names = [f.name for f in dataclasses.fields(Record) if f.name != "metrics"]
    schema = pa.schema(
        [pa.field(name, types.get(name, text)) for name in names]
        + [pa.field(name, number) for name in metrics],
        metadata={_VERSION_KEY: str(RECORDS_VERSION).encode()},
    )
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_table(path: Path) -> list[Record]:
    """The records of a Parquet file.

    Raises:
        ValueError: it is missing or damaged, no table of records, or newer than this program.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{str(path)!r} cannot be read as Parquet ({error})") from None
    version = (table.schema.metadata or {}).get(_VERSION_KEY)
    if version is None or int(version) > RECORDS_VERSION:
        raise ValueError(
            f"{str(path)!r} is of records version {version!r}, this program reads up to "
            f"{RECORDS_VERSION}; update sde-diffusion"
        )
    return [_unflat(row) for row in table.to_pylist()]


def _flat(record: Record) -> dict[str, Any]:
    row = record.as_dict()
    del row["version"]
    metrics = row.pop("metrics")
    row["settings"] = json.dumps(row["settings"], sort_keys=True)
    row["label"] = None if row["label"] is None else str(row["label"])
    return row | {f"metric_{name}": value for name, value in metrics.items()}


def _unflat(row: dict[str, Any]) -> Record:
    metrics = {
        name.removeprefix("metric_"): value
        for name, value in row.items()
        if name.startswith("metric_") and value is not None
    }
    label = row["label"]
    values = {name: value for name, value in row.items() if not name.startswith("metric_")}
    values |= {
        "settings": json.loads(row["settings"]),
        "label": int(label) if label is not None and label.isdigit() else label,
        "metrics": metrics,
        "version": RECORDS_VERSION,
    }
    return Record.from_dict(values)
