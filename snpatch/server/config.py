"""ServeConfig: everything that a server is started with, as one value: an engine, and what clients can name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from snpatch import schema
from snpatch.config import EngineConfig, place
from snpatch.errors import SnpatchError
from snpatch.judges.opening import is_code
from snpatch.schema import option
from snpatch.trust import ENGINE, SERVER, check_arguments, refuse

FILES = ("rankings", "constants", "guards")  # name -> file


@dataclass(frozen=True)
class ServeConfig:
    """rankings, constants, guards: name -> file. patches: name -> a patch as spec.PatchForm has it, perhaps with
    `guard`, the name of one. judges: name -> what snpatch.judges.open_judge takes. vllm_server: vLLM's own flags of its
    HTTP server (port, api_key, tool_call_parser, ...); those of its engine are the engine's `vllm`.
    """

    engine: EngineConfig
    rankings: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    guards: Mapping[str, str] = field(default_factory=dict)
    patches: Mapping[str, Mapping] = field(default_factory=dict)
    judges: Mapping[str, str] = field(default_factory=dict)
    vllm_server: Mapping[str, object] = field(default_factory=dict)
    allow_upload: str | None = option(
        None, "Folder that keeps rankings and constants which clients upload; without it nobody can."
    )
    max_waiting: int = option(256, "Requests that may wait for a place of what they name; further ones get 503.", min=0)
    max_sweep_texts: int = option(10_000, "Most texts of a sweep that a client asks for.", min=1)
    send_timeout_s: float = option(
        120.0, "Seconds within which a client must take each part of its answer; then it is dropped.", min=0.001
    )
    drain_s: float = option(120.0, "How many seconds SIGTERM waits for running requests.", min=0)

    def __post_init__(self) -> None:
        if not 0 <= self.drain_s < 1e6:
            raise SnpatchError(f"drain_s must be a number of seconds below 1e6, got {self.drain_s}")
        if not 0 < self.send_timeout_s < 1e6:
            raise SnpatchError(f"send_timeout_s: expected seconds in (0, 1e6), got {self.send_timeout_s}")

    @classmethod
    def load(cls, path: str | Path, trust: bool = False) -> "ServeConfig":
        """From a TOML or JSON file, whose paths are relative to its folder.

        trust: take what may run code or open the host, see snpatch.trust; otherwise it is an error.
        """
        where = f"server {path}"
        config = cls.from_table(schema.load_table(path, "server"), where).placed(Path(path).parent)
        if not trust:
            check_arguments(config.engine.vllm, ENGINE, f"{where}: vllm")
            check_arguments(config.vllm_server, SERVER, f"{where}: vllm_server")
            if config.allow_upload is not None:
                refuse(f"{where}: allow_upload", config.allow_upload)
            for name, source in config.judges.items():
                if is_code(source):
                    refuse(f"{where}: judges.{name}", source)
        return config

    @classmethod
    def from_table(cls, table: object, where: str = "server") -> "ServeConfig":
        """Read what `as_table` wrote, or a user: an engine's table with this class's own fields beside."""
        if not isinstance(table, Mapping):
            raise SnpatchError(f"{where}: wanted a table, got {table!r}")
        own = {f.name for f in fields(cls)} - {"engine"}
        engine = EngineConfig.from_table({name: one for name, one in table.items() if name not in own}, where)
        config = schema.read(cls, where, {"engine": engine, **{n: one for n, one in table.items() if n in own}})
        for name in (*FILES, "judges"):
            for key, value in getattr(config, name).items():
                schema.value_of(value, str, f"{where}: {name}.{key}")
        for key, value in config.patches.items():
            schema.value_of(value, Mapping, f"{where}: patches.{key}")
        return config

    def as_table(self) -> dict:
        """As plain data for TOML and JSON: what differs from the defaults."""
        default = ServeConfig(self.engine)
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "engine"}
        return self.engine.as_table() | {n: one for n, one in own.items() if one != getattr(default, n)}

    def placed(self, folder: Path) -> "ServeConfig":
        """The same with paths that are relative to a folder; what is no file there is a name and stays as it is, and
        so do vLLM's flags."""
        files = {name: {k: place(folder, v) for k, v in getattr(self, name).items()} for name in (*FILES, "judges")}
        upload = None if self.allow_upload is None else str(folder / self.allow_upload)
        return replace(self, engine=self.engine.placed(folder), allow_upload=upload, **files)
