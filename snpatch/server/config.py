"""ServeConfig: everything a server is started with, as one value: an engine and the names that clients can use."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from snpatch.config import EngineConfig, resolve_path
from snpatch.errors import SnpatchError
from snpatch.judges.factory import is_function_judge
from snpatch.judges.refusal import REFUSAL_JUDGE
from snpatch.names import check_names
from snpatch.trust import ENGINE, SERVER, check_arguments, refuse
from snpatch.utils import schema
from snpatch.utils.schema import option

FILES = ("rankings", "constants", "guards")  # fields that map names to files
MAX_SECONDS = 10**6  # of a timeout
ALWAYS_OPEN = ("/health", "/ping")  # routes that never need an API key
OPENABLE = """/version /metrics /load /docs /docs/oauth2-redirect /redoc /openapi.json /tokenize /detokenize""".split()
MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN = 1 << 20, 8  # of the default limit; a token id takes up to 8 bytes of JSON
NUM_INCOMING_BODIES = 256  # of the largest size, whose bytes may be in memory
CHARS_PER_TOKEN = 32  # longer prompts cannot fit in the context
COMPLETIONS_PER_SEQ = 4  # default limits, per sequence of max_num_seqs


@dataclass(frozen=True)
class ServeConfig:
    """Configuration of a server.

    Attributes:
        engine: The engine; vLLM's engine arguments are its `vllm`.
        rankings: name -> file.
        constants: name -> file.
        guards: name -> file.
        patches: name -> patch as in spec.PatchSchema, optionally with `guard`, the name of a guard.
        judges: name -> argument of snpatch.judges.open_judge.
        vllm_server: Flags of vLLM's HTTP server (port, api_key, tool_call_parser, ...).
    """

    engine: EngineConfig
    rankings: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    guards: Mapping[str, str] = field(default_factory=dict)
    patches: Mapping[str, Mapping] = field(default_factory=dict)
    judges: Mapping[str, str] = field(default_factory=dict)
    vllm_server: Mapping[str, object] = field(default_factory=dict)
    allow_upload: str | None = option(
        None, "Folder that stores rankings and constants uploaded by clients. Without it uploads are refused."
    )
    open_route: tuple[str, ...] = option(
        (),
        f"Route that needs no API key, like {' and '.join(ALWAYS_OPEN)}: one of {', '.join(OPENABLE)}. Repeatable.",
    )
    max_requests: int | None = option(
        None, "Maximum number of concurrent requests; further ones get HTTP 503. Default: 4 x max_num_seqs.", min=1
    )
    max_uploads: int = option(2, "Maximum number of concurrent uploads; further ones get HTTP 503.", min=1)
    max_waiting: int = option(
        256,
        "Maximum number of completions queued for adapter, ranking or constant slots; further requests get HTTP 503.",
        min=0,
    )
    max_body_bytes: int | None = option(
        None, "Maximum size of a JSON body in bytes. Default: 1 MiB, or 8 x the context length if larger.", min=1
    )
    max_incoming_bytes: int | None = option(
        None, "Maximum bytes in memory of bodies that are still incomplete. Default: 256 x max_body_bytes.", min=1
    )
    max_body_values: int = option(
        4096,
        "Maximum number of JSON values and names in a body; 32 token ids count as one. Responses: a quarter of it.",
        min=8,
    )
    body_timeout_s: float = option(
        60.0,
        "Timeout in seconds for the head of a request, and again for its body, to arrive.",
        min=0.001,
        below=MAX_SECONDS,
    )
    max_completions: int | None = option(
        None, "Maximum number of completions per request (prompts x n). Default: 4 x max_num_seqs.", min=1
    )
    max_prompt_chars: int | None = option(
        None,
        "Maximum number of characters of a /tokenize input or a sweep prompt. Default: 32 x the context length.",
        min=1,
    )
    max_logprob_values: int = option(
        10_240,
        "Maximum number of log-probabilities per response: prompt tokens plus, unless streamed, max_tokens.",
        min=1,
    )
    max_grammar_chars: int = option(
        16_384, "Maximum number of characters of a regex, grammar, choice or JSON schema for structured output.", min=1
    )
    max_sweep_completions: int = option(10_000, "Maximum number of completions of a client's sweep.", min=1)
    send_timeout_s: float = option(
        120.0,
        "Timeout in seconds for a client to read each part of its response; then it is disconnected.",
        min=0.001,
        below=MAX_SECONDS,
    )
    max_sweep_windows: int = option(1024, "Maximum number of windows of a client's sweep.", min=1)
    drain_s: float = option(
        120.0, "Seconds that shutdown (SIGTERM) waits for running requests.", min=0, below=MAX_SECONDS
    )

    def __post_init__(self) -> None:
        for kind in (*FILES, "patches", "judges"):
            check_names(getattr(self, kind), f"one of the {kind}")
        if self.judges.get(REFUSAL_JUDGE, REFUSAL_JUDGE) != REFUSAL_JUDGE:
            raise SnpatchError(
                f"judges: {REFUSAL_JUDGE} is the name of the built-in judge of refusal words. Choose another name."
            )
        schema.validate(self)
        if unknown := [path for path in self.open_route if path not in OPENABLE]:
            raise SnpatchError(f"open_route: expected one of {', '.join(OPENABLE)}, got {', '.join(unknown)}")

    @classmethod
    def load(cls, path: str | Path, trust: bool = False) -> "ServeConfig":
        """Load a config from a TOML or JSON file.

        Args:
            path: The file. Paths in it are relative to its folder.
            trust: Accept values that may run code or open the host; see snpatch.trust.

        Raises:
            SnpatchError: Unknown keys, wrong types, or values that need `trust`.
        """
        context = f"server {path}"
        config = cls.from_dict(schema.load_table(path, "server"), context).placed(Path(path).parent)
        if not trust:
            check_arguments(config.engine.vllm, ENGINE, f"{context}: vllm")
            check_arguments(config.vllm_server, SERVER, f"{context}: vllm_server")
            for name in ("allow_upload", "open_route"):
                if value := getattr(config, name):
                    refuse(f"{context}: {name}", value)
            for name, source in config.judges.items():
                if is_function_judge(source):
                    refuse(f"{context}: judges.{name}", source)
        return config

    @classmethod
    def from_dict(cls, table: object, context: str = "server") -> "ServeConfig":
        """Build a config from plain data: an engine's table plus this class's own fields.

        Args:
            table: Data as `to_dict` returns it.
            context: Name of the data in error messages.

        Raises:
            SnpatchError: Unknown keys or wrong types.
        """
        if not isinstance(table, Mapping):
            raise SnpatchError(f"{context}: expected a table, got {table!r}")
        names = {f.name for f in fields(cls)} - {"engine"}
        engine = EngineConfig.from_dict({name: value for name, value in table.items() if name not in names}, context)
        own_values = {name: value for name, value in table.items() if name in names}
        config = schema.from_dict(cls, context, {"engine": engine, **own_values})
        for name in (*FILES, "judges"):
            for key, value in getattr(config, name).items():
                schema.coerce(value, str, f"{context}: {name}.{key}")
        for key, value in config.patches.items():
            schema.coerce(value, Mapping, f"{context}: patches.{key}")
        return config

    def to_dict(self) -> dict:
        """Return the values that differ from the defaults, as plain data for TOML and JSON."""
        default = ServeConfig(self.engine)
        own_values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "engine"}
        changed = {name: value for name, value in own_values.items() if value != getattr(default, name)}
        return self.engine.to_dict() | changed

    def resolve_limits(self, context: int, max_num_seqs: int) -> "ServeConfig":
        """Return the config with each limit that was left out set from the engine's sizes.

        Args:
            context: Context length in tokens.
            max_num_seqs: Sequences that vLLM runs at once.
        """
        body_bytes = self.max_body_bytes or max(MIN_BODY_BYTES, BODY_BYTES_PER_TOKEN * context)
        defaults = {
            "max_requests": COMPLETIONS_PER_SEQ * max_num_seqs,
            "max_body_bytes": body_bytes,
            "max_incoming_bytes": NUM_INCOMING_BODIES * body_bytes,
            "max_completions": COMPLETIONS_PER_SEQ * max_num_seqs,
            "max_prompt_chars": CHARS_PER_TOKEN * context,
        }
        return replace(self, **{name: n for name, n in defaults.items() if getattr(self, name) is None})

    def placed(self, folder: Path) -> "ServeConfig":
        """Return the config with paths resolved against a folder.

        Values that are no file there are names and stay unchanged; so do vLLM's flags.
        """
        files = {
            name: {k: resolve_path(folder, v) for k, v in getattr(self, name).items()} for name in (*FILES, "judges")
        }
        upload = None if self.allow_upload is None else str(folder / self.allow_upload)
        return replace(self, engine=self.engine.placed(folder), allow_upload=upload, **files)
