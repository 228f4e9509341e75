"""File readers: rows and their locations, invalid rows, damaged files, and samples."""

import gzip
import json
import lzma
from contextlib import suppress

import pytest
from published import ROWS, lines, parquet, talk, turns, write

from snpatch.data import file_reader, load_dataset, read_completions
from snpatch.errors import SnpatchError


def user(text):
    return [{"role": "user", "content": text}]


def build_rows(n):
    return [{"prompt": f"p{i}"} for i in range(n)]


def write_file(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def texts(data):
    return [prompt[-1]["content"] for prompt in data.prompts]


def test_jsonl_with_bom_blanks_and_line_ends_is_read(tmp_path):
    rows = [json.dumps({"prompt": p}, ensure_ascii=False) for p in (" a\u2028b\x85c ", "d")]
    path = write_file(tmp_path, "p.jsonl", f"\ufeff\r\n{rows[0]}\r\n \n\n{rows[1]}".encode())
    data = load_dataset(path)
    assert texts(data) == ["a\u2028b\x85c", "d"]
    assert [e.meta for e in data.examples] == [{"file": str(path), "row": 2}, {"file": str(path), "row": 5}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "half', "not JSON"),
        ('{"prompt": "café"}'.encode("latin-1"), "not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "\\ud800"}', "prompt: expected UTF-8, got half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": 7}', "prompt: expected a non-empty string, got 7"),
        (b'{"prompt": " "}', "prompt: expected a non-empty string, got ' '"),
        (b'{"messages": "hi"}', "messages: expected a list of role and content, got 'hi'"),
        (b'{"messages": []}', "expected turns with a user turn"),
        (b'{"text": "x"}', "expected an object with prompt or messages"),
        (b'"x"', "expected an object with prompt or messages"),
    ],
)
def test_invalid_line_is_numbered_or_counted(tmp_path, line, message):
    path = write_file(tmp_path, "p.jsonl", b'\n{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(SnpatchError, match=rf"p\.jsonl, line 4: {message}"):
        load_dataset(path)
    data = load_dataset(path, skip_invalid=True)
    assert (texts(data), data.skipped, data.source["rows"]) == (["a", "b"], 1, 3)
    assert data.examples[1].meta["row"] == 5


def test_csv_with_long_fields_counts_physical_lines(tmp_path):
    long_text = "x" * 200_000
    content = f'id,prompt\r\n1,"two\nlines, ""quoted"""\r\n\r\n2,{long_text}\r\n3,a,b\r\n4,last\r\n'
    path = write_file(tmp_path, "p.csv", b"\xef\xbb\xbf" + content.encode())
    with pytest.raises(SnpatchError, match=r"p\.csv, line 6: expected 2 fields, got 3"):
        load_dataset(path)
    data = load_dataset(path, skip_invalid=True)
    assert texts(data) == ['two\nlines, "quoted"', long_text, "last"]
    assert [(e.meta["id"], e.meta["row"]) for e in data.examples] == [("1", 2), ("2", 5), ("4", 7)]


def test_csv_row_without_utf8_is_invalid(tmp_path):
    path = write_file(tmp_path, "p.csv", b"prompt\na\ncaf\xe9\nb\n")
    with pytest.raises(SnpatchError, match=r"p\.csv, line 3: not UTF-8"):
        load_dataset(path)
    assert texts(load_dataset(path, skip_invalid=True)) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b'prompt\na\n"b\nc\n', r"p\.csv, line 3: not CSV: unexpected end of data"),
        ("p.csv", b'prompt\n"a"b\n', r"p\.csv, line 2: not CSV"),
        ("p.csv", b"text,id\na,1\n", r"p\.csv: expected the columns prompt or messages, got text, id"),
        ("p.csv", b"prompt;id\na;1\n", r"p\.csv: expected columns separated by ',', got 'prompt;id', separated by ';'"),
        ("p.csv", b"prompt\tid\na\t1\n", r"got 'prompt\\tid', separated by '\\t'\. Convert it to commas\."),
        ("p.csv", b"prompt,prompt\na,b\n", r"p\.csv: two columns have one name"),
        ("p.csv", b"", r"p\.csv: expected prompts, got none"),
        ("p.raw", b"a\nb\n", r"p\.raw: expected the columns prompt or messages, got text"),
        ("p.json", b'\n[{"prompt": "a"},\n{"prompt": }]', r"p\.json: not JSON: .* line 3"),
        ("p.jsonl", b"\n\n", r"p\.jsonl: expected prompts, got none in 0 rows \(0 invalid\)"),
        ("p.jsonl", b"{}\n{}\n", r"p\.jsonl: expected prompts, got none in 2 rows \(2 invalid\)"),
        ("p.jsonl.gz", gzip.compress(lines(build_rows(999)))[:-40], r"p\.jsonl\.gz: cannot be read"),
        ("p.jsonl.gz", lines(build_rows(9)), r"p\.jsonl\.gz: cannot be read"),
        ("p.jsonl.xz", lzma.compress(lines(build_rows(999)))[:-40], r"p\.jsonl\.xz: cannot be read"),
        ("p.jsonl.xz", lines(build_rows(9)), r"p\.jsonl\.xz: cannot be read"),
        ("p.csv.gz", gzip.compress(b"prompt\n" + b"a\n" * 9999)[:-9], r"p\.csv\.gz: cannot be read"),
        ("p.parquet", parquet(build_rows(9))[:-9], r"p\.parquet: cannot be read"),
        ("p.parquet", parquet([{"text": "a"}]), r"p\.parquet: expected the columns prompt or messages, got text"),
        ("p.tsv", b"prompt\na\n", r"p\.tsv: expected a file that ends in \.jsonl, \.json, \.csv, \.parquet"),
    ],
)
def test_damaged_file_raises_even_with_skip_invalid(tmp_path, name, content, message):
    path = write_file(tmp_path, name, content)
    for skip_invalid in (True,) if "2 invalid" in message else (True, False):
        with pytest.raises(SnpatchError, match=message):
            load_dataset(path, skip_invalid=skip_invalid)


def test_parquet_row_numbers_continue_over_row_groups(tmp_path):
    path = write_file(tmp_path, "p.parquet", parquet([*build_rows(70_000), {"prompt": None}]))
    with pytest.raises(SnpatchError, match=r"p\.parquet, row 70001: prompt: expected a non-empty string, got None"):
        load_dataset(path)
    assert load_dataset(path, skip_invalid=True).examples[-1].meta["row"] == 70_000


def test_wikitext_line_without_utf8_is_invalid(tmp_path):
    path = write_file(tmp_path, "wiki.test.raw", b" \r\n = A = \r\n \n caf\xe9\n")
    with pytest.raises(SnpatchError, match=r"wiki\.test\.raw, line 4: not UTF-8"):
        load_dataset(path, format="wikitext-2")
    assert load_dataset(path, format="wikitext-2", skip_invalid=True).text == "\n\n = A = \n\n\n"


def test_folder_shards_are_read_in_name_order(tmp_path):
    rows = build_rows(6)
    for i in (2, 0, 1):
        write(tmp_path / "data", f"test-0000{i}-of-00003", ".parquet", rows[2 * i : 2 * i + 2])
    write_file(tmp_path, "README.md", b"# card")
    write_file(tmp_path, ".cache/test.parquet", b"junk")
    data = load_dataset(tmp_path, split="test")
    assert texts(data) == [row["prompt"] for row in rows]
    assert data.examples[3].meta == {"file": str(tmp_path / "data/test-00001-of-00003.parquet"), "row": 2}
    assert load_dataset(tmp_path).fingerprint == data.fingerprint


def test_folder_split_selects_files(tmp_path):
    for domain in ("askbaking", "legaladvice"):
        for split, rows in (("train", ROWS["shp"]), ("test", ROWS["shp"][:1])):
            write(tmp_path / "shp" / domain, split, ".json", rows)
    assert len(load_dataset(tmp_path / "shp", format="shp", split="train")) == 4
    assert len(load_dataset(tmp_path / "shp", format="shp", split="test")) == 2
    with pytest.raises(SnpatchError, match=r"shp: holds several splits \(train, test\): choose one with split"):
        load_dataset(tmp_path / "shp", format="shp")
    with pytest.raises(SnpatchError, match="shp: holds no data file with 'validation' in its name"):
        load_dataset(tmp_path / "shp", format="shp", split="validation")
    write(tmp_path / "wiki", "wiki.test", ".raw", ROWS["wikitext-2"])
    write(tmp_path / "wiki", "wiki.valid", ".raw", ROWS["wikitext-2"][:1])
    assert len(load_dataset(tmp_path / "wiki", format="wikitext-2", split="test")) == 5
    write(tmp_path / "wiki", "wiki.test", ".jsonl", ROWS["wikitext-2"])
    with pytest.raises(SnpatchError, match=r"holds several kinds of file \(\.jsonl, \.raw\)"):
        load_dataset(tmp_path / "wiki", format="wikitext-2", split="test")


def test_conflicting_load_arguments_are_rejected(tmp_path):
    path = write(tmp_path, "p", ".jsonl", build_rows(2))
    for arguments, message in (
        ({"source": "beavertail"}, r"beavertail: expected a file or a dataset \(beavertails, hh-harmless,"),
        ({"source": path, "format": "beavertail"}, "format: expected one of beavertails, .* got 'beavertail'"),
        (
            {"source": path, "format": "lima", "column": "prompt"},
            "column: expected none with format lima, which has its own, got 'prompt'",
        ),
        ({"source": path, "split": "test"}, r"p\.jsonl: split chooses among the files of a folder"),
        ({"source": path, "revision": "main"}, "expected a dataset name with revision, got a path"),
        (
            {"source": "lima", "format": "lima"},
            r"lima: expected a file with format and column.* Write \./lima for a file",
        ),
        ({"source": "lima", "column": "x"}, "lima: expected a file with format and column"),
        ({"source": tmp_path / "nothing"}, "nothing: expected a file or a dataset"),
    ):
        with pytest.raises(SnpatchError, match=message):
            load_dataset(**arguments)


def test_column_selects_prompt_of_any_file(tmp_path):
    rows = [{"question": "Why?", "chosen": "So.", "rejected": "No.", "id": 3}]
    pair = {"prompt": turns("Why?"), "chosen": turns("", "So.")[1:], "rejected": turns("", "No.")[1:]}
    for kind in (".jsonl", ".csv", ".parquet"):
        data = load_dataset(write(tmp_path, "q", kind, rows), column="question")
        assert data.prompts == [user("Why?")]
        assert data.pairs() == [pair]
        assert str(data.examples[0].meta["id"]) == "3"
    with pytest.raises(SnpatchError, match=r"q\.csv: expected the columns prompt, got question, chosen"):
        load_dataset(tmp_path / "q.csv", column="prompt")


def test_messages_and_answers_of_any_file_are_read(tmp_path):
    system = [{"role": "system", "content": "Be kind."}]
    rows = [
        {"messages": [*system, *turns("a", "b", "c")]},
        {"messages": turns("a", "b", "c", " d ")},
        {"prompt": "a", "completion": "b"},
    ]
    data = load_dataset(write(tmp_path, "m", ".jsonl", rows))
    assert data.prompts == [[*system, *turns("a", "b", "c")], turns("a", "b", "c"), user("a")]
    assert [e.response for e in data.examples] == [None, "d", "b"]
    assert data.conversations() == [{"messages": turns("a", "b", "c", "d")}, {"messages": turns("a", "b")}]
    for row, message in (
        ({"messages": turns("a", "b") + turns("", "c")[1:]}, "expected nothing but one assistant turn after the last"),
        ({"prompt": "a", "chosen": user("b")}, "chosen: expected a string or one assistant turn"),
        ({"prompt": "a", "response": 7}, "response: expected a string, got 7"),
    ):
        with pytest.raises(SnpatchError, match=f"line 1: {message}"):
            load_dataset(write(tmp_path, "m", ".jsonl", [row]))


def test_pairs_and_conversations_survive_save_and_load(tmp_path):
    hh = load_dataset(write(tmp_path, "hh", ".jsonl", ROWS["hh-harmless"]), format="hh-harmless")
    assert load_dataset(write(tmp_path, "pairs", ".jsonl", hh.pairs())).pairs() == hh.pairs()
    lima = load_dataset(write(tmp_path, "lima", ".jsonl", ROWS["lima"]), format="lima")
    reloaded_data = load_dataset(write(tmp_path, "said", ".parquet", lima.conversations()))
    assert reloaded_data.conversations() == lima.conversations()


def test_sample_is_reproducible_without_replacement(tmp_path):
    data = load_dataset(write(tmp_path, "p", ".jsonl", build_rows(10)))
    sample = data.sample(4, seed=1)
    assert texts(sample) == ["p2", "p9", "p6", "p4"]  # for ever: numpy keeps this stream
    assert texts(data.sample(10, seed=1))[:4] == texts(sample)
    assert sorted(texts(data.sample(10, seed=1))) == sorted(texts(data))
    assert texts(data.sample(4, seed=2)) != texts(sample)
    assert sample.source["selection"] == ["4 drawn with seed 1"]
    assert sample.fingerprint != data.fingerprint == sample.source["sha256"]
    assert sample.first(2).source["selection"] == ["4 drawn with seed 1", "first 2"]
    assert sample.last(2).examples == sample.examples[2:]
    assert sample.last(9).examples == sample.examples
    with pytest.raises(SnpatchError, match="last: expected at least 1 example, got 0"):
        sample.last(0)
    assert (len(data.first(3)), len(data.first(99)), texts(data.first(2))) == (3, 10, ["p0", "p1"])
    with pytest.raises(SnpatchError, match="first: expected at least 1 example, got 0"):
        data.first(0)
    with pytest.raises(SnpatchError, match="seed: expected 0"):
        data.sample(1, seed=-1)
    for n in (11, 0, -1):
        with pytest.raises(SnpatchError, match=rf"p\.jsonl: sample: expected 1\.\.10 examples, got {n}"):
            data.sample(n, seed=1)


def test_fingerprint_covers_prompts_and_answers(tmp_path):
    def fingerprint(**changes):
        return load_dataset(
            write(tmp_path, "d", ".jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", **changes}])
        ).fingerprint

    assert fingerprint() == fingerprint(id=7)
    assert (
        len(
            {
                fingerprint(),
                fingerprint(prompt="x"),
                fingerprint(chosen="x"),
                fingerprint(rejected="x"),
                fingerprint(response="x"),
            }
        )
        == 5
    )
    histories = [
        load_dataset(write(tmp_path, "hh", ".jsonl", [row]), format="hh-harmless").fingerprint
        for row in ({"chosen": talk("a", x, "b", "c"), "rejected": talk("a", x, "b", "d")} for x in "yz")
    ]
    assert histories[0] != histories[1]


def test_generated_file_gives_prompts_and_completions(tmp_path):
    path = write(tmp_path, "out", ".jsonl", [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "y"}])
    assert load_dataset(path).prompts == [user("a"), user("b")]
    assert load_dataset(path).first(1).prompts == [user("a")]
    assert read_completions(path) == ["", "y"]
    path = write_file(tmp_path, "bad.jsonl", path.read_bytes() + b'{"prompt": "c"}\n')
    assert read_completions(path, 2) == ["", "y"]
    with pytest.raises(SnpatchError, match=r"bad\.jsonl, line 3: expected an object with a completion"):
        read_completions(path)
    with pytest.raises(SnpatchError, match=r"none\.jsonl: no such file"):
        read_completions(tmp_path / "none.jsonl")


# ---- bombs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch):
    """Return a line of 1000 bytes, and of compressed files 1000 bytes or 10 times their size."""
    monkeypatch.setattr(file_reader, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(file_reader, "MAX_EXPANSION", 10)


@pytest.mark.parametrize("packed", [gzip.compress, lzma.compress, bytes], ids=["gz", "xz", "plain"])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("jsonl", b'{"prompt": "%s"}' % (b"a" * 2000)),
        ("jsonl", b" " * 2000),
        ("csv", b"prompt\n" + b"a" * 2000),
        ("csv", b'prompt\n"' + b"a\n" * 1000 + b'"\n'),
        ("txt", b"a" * 2000),
    ],
)
def test_endless_line_raises_one_line_error(tmp_path, small_limits, packed, kind, content):
    suffix = {gzip.compress: ".gz", lzma.compress: ".xz"}.get(packed, "")
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(packed(content))
    columns = (("text",),) if kind == "txt" else (("prompt",),)
    with pytest.raises(SnpatchError, match=r"expected at most 1000 bytes|field larger than field limit|times its size"):
        list(file_reader.read_rows(path, columns))


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("jsonl", b"\n" * 100_000),
        ("jsonl", b"[" + b"[],\n" * 100_000 + b"0]"),
        ("csv", b"prompt\n" + b"a\n" * 100_000),
        ("txt", b"a\n" * 100_000),
    ],
)
def test_decompression_bomb_raises_one_line_error(tmp_path, small_limits, kind, content):
    (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress(content))
    columns = (("text",),) if kind == "txt" else (("prompt",),)
    with pytest.raises(SnpatchError, match=r"expected at most \d+ bytes \(10 times its size\), got more"):
        list(file_reader.read_rows(tmp_path / f"a.{kind}.gz", columns))
    (tmp_path / f"a.{kind}").write_bytes(content)
    list(file_reader.read_rows(tmp_path / f"a.{kind}", columns))


def test_line_above_default_limit_is_rejected(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"prompt": "')
        for _ in range(128):
            file.write(b"a" * 2**20)
    with pytest.raises(SnpatchError, match=f"line 1: expected at most {2**26} bytes, got more"):
        load_dataset(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("depth", [101, 500, 100_000])
def test_deeply_nested_row_raises_one_line_error(tmp_path, depth):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "x": ' + "[" * depth + "]" * depth + "}\n")
    with pytest.raises(SnpatchError, match="line 1: not JSON: nested deeper than 100 levels"):
        load_dataset(tmp_path / "a.jsonl")


@pytest.mark.parametrize("depth", [30, 300, 3000])
def test_deeply_nested_parquet_column_is_read_or_raises_one_line_error(tmp_path, depth):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kind = pyarrow.int64()
    for _ in range(depth):
        kind = pyarrow.struct([("a", kind)])
    try:
        table = pyarrow.table({"prompt": ["a"], "x": pyarrow.nulls(1, kind)})
        parquet.write_table(table, tmp_path / "a.parquet")
    except (pyarrow.ArrowException, RecursionError):
        pytest.skip("pyarrow does not write it")
    with suppress(SnpatchError):  # any other error fails the test
        assert len(load_dataset(tmp_path / "a.parquet")) == 1
