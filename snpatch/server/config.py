"""ServeConfig: everything that a server is started with, as one value: an engine, and what clients can name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from snpatch import schema
from snpatch.config import EngineConfig, place
from snpatch.errors import SnpatchError
from snpatch.judges.factory import REFUSAL, is_function_judge
from snpatch.names import check_names
from snpatch.schema import option
from snpatch.trust import ENGINE, SERVER, check_arguments, refuse

FILES = ("rankings", "constants", "guards")  # name -> file
ALWAYS_OPEN = ("/health", "/ping")  # without an API key, too
OPENABLE = """/version /metrics /load /docs /docs/oauth2-redirect /redoc /openapi.json /tokenize /detokenize""".split()
LEAST_BODY_BYTES, BODY_BYTES_PER_TOKEN = 1 << 20, 8  # of the default limit; a token id in JSON takes up to 8 bytes
ARRIVING_BODIES = 256  # that may be large
LETTERS_PER_TOKEN = 32  # of the context: longer prompts cannot fit
TEXTS_PER_SEAT = 4  # seats: max_num_seqs


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
    open_route: tuple[str, ...] = option(
        (),
        f"Route that needs no API key, as {' and '.join(ALWAYS_OPEN)}: one of {', '.join(OPENABLE)}. May be repeated.",
    )
    max_requests: int | None = option(
        None, "Requests that may run at once; further ones get 503. Default: 4 x max_num_seqs.", min=1
    )
    max_uploads: int = option(2, "Uploads that may run at once; further ones get 503.", min=1)
    max_waiting: int = option(256, "Requests that may wait for a place of what they name; further ones get 503.", min=0)
    max_body_bytes: int | None = option(
        None, "Most bytes of a JSON body. Default: 1 MiB, or 8 x the context where that is more.", min=1
    )
    max_incoming_bytes: int | None = option(
        None, "Most bytes in memory of bodies that have not arrived in full. Default: 256 x max_body_bytes.", min=1
    )
    max_body_values: int = option(
        4096, "Most JSON values and names in a body; 32 token ids are one. Responses: a quarter of it.", min=8
    )
    body_timeout_s: float = option(
        60.0, "Seconds in which the head of a request, and then its body, must arrive.", min=0.001
    )
    max_completions: int | None = option(
        None, "Most texts of a request (prompts x n). Default: 4 x max_num_seqs.", min=1
    )
    max_prompt_chars: int | None = option(
        None, "Most letters of a text to /tokenize and of a sweep's prompt. Default: 32 x the context.", min=1
    )
    max_logprob_values: int = option(
        10_240, "Most log-probabilities in an answer: of its prompts and, unless it is streamed, of max_tokens.", min=1
    )
    max_grammar_chars: int = option(
        16_384, "Most letters of a regex, grammar, choice or JSON schema that constrains a text.", min=1
    )
    max_sweep_completions: int = option(10_000, "Most texts of a sweep that a client asks for.", min=1)
    send_timeout_s: float = option(
        120.0, "Seconds within which a client must take each part of its answer; then it is dropped.", min=0.001
    )
    max_sweep_windows: int = option(1024, "Most windows of a sweep that a client asks for.", min=1)
    drain_s: float = option(120.0, "How many seconds SIGTERM waits for running requests.", min=0)

    def __post_init__(self) -> None:
        for kind in (*FILES, "patches", "judges"):
            check_names(getattr(self, kind), f"one of the {kind}")
        if self.judges.get(REFUSAL, REFUSAL) != REFUSAL:
            raise SnpatchError(f"judges: {REFUSAL} is the judge of refusal words; choose another name")
        if not 0 <= self.drain_s < 1e6:
            raise SnpatchError(f"drain_s must be a number of seconds below 1e6, got {self.drain_s}")
        if not 0 < self.send_timeout_s < 1e6:
            raise SnpatchError(f"send_timeout_s: expected seconds in (0, 1e6), got {self.send_timeout_s}")
        if not 0 < self.body_timeout_s < 1e6:
            raise SnpatchError(f"body_timeout_s: expected seconds in (0, 1e6), got {self.body_timeout_s}")
        if unknown := [path for path in self.open_route if path not in OPENABLE]:
            raise SnpatchError(f"open_route: expected one of {', '.join(OPENABLE)}, got {', '.join(unknown)}")

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
            for name in ("allow_upload", "open_route"):
                if given := getattr(config, name):
                    refuse(f"{where}: {name}", given)
            for name, source in config.judges.items():
                if is_function_judge(source):
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

    def resolve_limits(self, context: int, max_num_seqs: int) -> "ServeConfig":
        """Return the config with every limit that was left out, as the engine's sizes set it."""
        body_bytes = self.max_body_bytes or max(LEAST_BODY_BYTES, BODY_BYTES_PER_TOKEN * context)
        defaults = {
            "max_requests": TEXTS_PER_SEAT * max_num_seqs,
            "max_body_bytes": body_bytes,
            "max_incoming_bytes": ARRIVING_BODIES * body_bytes,
            "max_completions": TEXTS_PER_SEAT * max_num_seqs,
            "max_prompt_chars": LETTERS_PER_TOKEN * context,
        }
        return replace(self, **{name: n for name, n in defaults.items() if getattr(self, name) is None})

    def placed(self, folder: Path) -> "ServeConfig":
        """The same with paths that are relative to a folder; what is no file there is a name and stays as it is, and
        so do vLLM's flags."""
        files = {name: {k: place(folder, v) for k, v in getattr(self, name).items()} for name in (*FILES, "judges")}
        upload = None if self.allow_upload is None else str(folder / self.allow_upload)
        return replace(self, engine=self.engine.placed(folder), allow_upload=upload, **files)
