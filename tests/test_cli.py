"""The command line: what it refuses, what it prints, and that text comes through it unharmed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apb.compress import COMPRESSORS, compressor
from apb.setup import Setup
from apb.strategies import STRATEGIES, strategy
from burst.errors import HostFailure
from launch.cli import main
from launch.display import Display
from launch.document import FACT, default_document
from launch.interrupt import interruptible
from launch.settings import ClusterSettings, DecodeSettings
from launch.verbs import VERBS
from tests.tiny import build, byte_tokenizer, llama_config

CONTEXT = 600  # positions of the tiny model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer; its path has a space and '='."""
    folder = tmp_path_factory.mktemp("models") / "tiny = llama, really"
    build(llama_config(max_position_embeddings=CONTEXT)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """A document of some two hundred tokens."""
    file = tmp_path / "document.txt"
    file.write_text("the king of the hill sees the sea. " * 9)
    return file


@dataclasses.dataclass
class Ran:
    """What a command came to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document: the only line on stdout."""
        (line,) = self.out.splitlines()
        found: dict[str, Any] = json.loads(line)
        return found

    def refused(self, *words: str) -> dict[str, str]:
        """Check the shape of a user's error that contains ``words``, on both streams, and return it."""
        assert self.code == 2, (self.out, self.err)
        error = self.document["error"]
        assert set(error) == {"type", "given", "allowed", "remedy", "message"}
        assert error["type"] == "UserError" and all(isinstance(v, str) for v in error.values())
        for word in words:
            assert word in " ".join(error.values()), error
        assert error["message"] in self.err and "Traceback" not in self.err
        found: dict[str, str] = error
        return found


@pytest.fixture
def apb(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in an empty working directory, and check that it leaves nothing there."""
    here = tmp_path / "cwd"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*argv: str) -> Ran:
        code = main(list(argv))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    yield run
    assert list(here.iterdir()) == []


@pytest.fixture
def ask(apb: Any, model: Path, document: Path) -> Any:
    """Run ``apb ask`` on the tiny model and document with further arguments."""
    given = ("ask", f"model={model}", "cluster=virtual", "decode.max_new_tokens=4")
    return lambda *argv: apb(*given, "-d", str(document), "-q", "Who sees?", *argv)


KEYS = {
    *("answer", "token_ids", "model", "strategy", "cluster", "hosts", "context_tokens", "query_tokens"),
    *("prefill_s", "ttft_s", "decode_tokens_per_s", "bytes_sent", "bytes_by_kind", "host_work_s"),
    *("peak_rss_bytes", "accepted_length", "plan", "versions"),
}


def test_ask(ask: Any, model: Path) -> None:
    ran = ask()
    assert ran.code == 0
    found = ran.document
    assert set(found) >= KEYS
    assert found["model"] == str(model) and found["strategy"] == "apb" and found["cluster"] == "virtual"
    assert found["hosts"] == 4 == len(found["host_work_s"]) and 1 <= len(found["token_ids"]) <= 4
    assert found["bytes_sent"] == sum(found["bytes_by_kind"].values()) > 0
    assert "Answer: " in ran.err and "time to first token" in ran.err and "took turns" in ran.err


def test_ask_compares_with_full_attention(ask: Any) -> None:
    found = ask("compare=true", "strategy=star", "cluster.hosts=3").document
    other = found["compare"]
    assert set(other) >= KEYS and other["strategy"] == "full" and other["hosts"] == 1
    assert found["speedup"] == other["speedup"] == other["prefill_s"] / found["prefill_s"]
    assert found["strategy"] == "star" and found["hosts"] == 3


def test_options_stand_anywhere(apb: Any, model: Path, document: Path) -> None:
    ran = apb("strategy=full", "-q", "Who?", "cluster=virtual", "ask", "-d", str(document), f"model={model}")
    assert ran.code == 0 and ran.document["hosts"] == 1


def test_out_writes_result_configuration_and_log(ask: Any, tmp_path: Path) -> None:
    out = tmp_path / "results, é = 1"
    found = ask(f"out={out}", "strategy.passing_len=3").document
    assert json.loads((out / "result.json").read_text()) == found
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["strategy"]["passing_len"] == 3 and config["out"] == str(out)
    assert "Answer: " in (out / "apb.log").read_text()
    error = ask(f"out={out}", "cluster.hosts=1000").refused("more hosts than context tokens")
    assert json.loads((out / "result.json").read_text())["error"] == error
    assert "more hosts than context tokens" in (out / "apb.log").read_text()


def test_out_that_cannot_be_written(ask: Any, document: Path) -> None:
    ask(f"out={document}/below").refused("folder for results")


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=abp"], ["unknown strategy 'abp'", "Did you mean apb"]),
        (["compress=quer"], ["unknown compress", "Did you mean query"]),
        (["cluster=rey"], ["Did you mean ray"]),
        (["decode=greedy"], ["unknown decode 'greedy'", "autoregressive"]),
        (["strategy="], ["unknown strategy"]),
        (["cluster.hots=3"], ["unknown key 'cluster.hots'", "cluster.hosts"]),
        (["hosts=3"], ["unknown key 'hosts'", "Did you mean cluster.hosts?"]),
        (["hydra.run.dir=x"], ["unknown key"]),
        (["strategy.name=star"], ["unknown key"]),
        (["strategy=star", "strategy.anchor_len=3"], ["has no option 'anchor_len'", "strategy=apb"]),
        (["compress.window=3"], ["compress choice that is not made", "compress=query"]),
        (["cluster.address=here:1"], ["has no option 'address'", "cluster=ray"]),
        (["cluster.hosts=abc"], ["cluster.hosts must be a whole number or null", "cluster.hosts=abc"]),
        (["cluster.hosts=2.5"], ["whole number"]),
        (["cluster.hosts=true"], ["whole number"]),
        (["cluster.hosts=[2]"], ["whole number"]),
        (["cluster.hosts=0"], ["cluster.hosts is out of range", "1 or more"]),
        (["cluster.hosts=-1"], ["1 or more"]),
        (["cluster.threads=0"], ["1 or more"]),
        (["cluster.hosts=1000"], ["more hosts than context tokens", "1000 hosts"]),
        (["cluster.hosts=2,3"], ["several values", "-m"]),
        (["chat=perhaps"], ["chat must be true or false"]),
        (["timeout_s=0"], ["timeout_s"]),
        (["dtype=float31"], ["unknown dtype", "float32"]),
        (["device=tpu"], ["tpu"]),
        (["strategy.passing=wring"], ["strategy.passing", "ring"]),
        (["strategy.anchor_len=2"], ["the anchor must hold", "strategy.anchor_len=2"]),
        (["strategy.passing_len=500"], ["passing block cannot be longer"]),
        (["strategy=star", "compress=query"], ["takes no compressor"]),
        (["strategy=full", "compress=norm"], ["takes no compressor"]),
        (["strategy=full", "cluster.hosts=4"], ["runs on one host"]),
        (["decode.max_new_tokens=0"], ["decode.max_new_tokens", "1 or more"]),
        (["decode.max_new_tokens=500"], ["longer than the model's context", f"{CONTEXT} positions"]),
        (["decode.temperature=-1"], ["decode.temperature is out of range"]),
        (["decode.temperature=warm"], ["decode.temperature must be a number"]),
        (["decode.temperature=nan"], ["decode.temperature"]),
        (["decode.top_p=0"], ["decode.top_p is out of range"]),
        (["decode.top_k=-1"], ["decode.top_k is out of range"]),
        (["decode.seed=-1"], ["decode.seed is out of range"]),
        (["decode.stop=[1]"], ["list of texts"]),
        (["decode.stop=['']"], ["decode.stop"]),
        (["cluster.hosts={"], ["cannot be read"]),
        (["cluster.hosts=${nothing}"], ["cluster.hosts"]),
        (["+chat=false"], ["never added"]),
        (["~chat"], ["never added or removed"]),
        (["strategy@x=star"], ["key=value"]),
        (["--hosts=3"], ["unknown option '--hosts'"]),
        (["--documnet"], ["Did you mean --document"]),
        (["somewhere.txt"], ["neither an option nor a setting", "-d"]),
        (["-q"], ["-q needs a value"]),
        (["-q", " \n"], ["the question is empty"]),
        (["-q", "\udcff"], ["not valid UTF-8"]),
        (["-m", "cluster.hosts=interval(1,2)"], ["cannot be listed"]),
    ],
)
def test_refused(ask: Any, overrides: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apb.engine._start", lambda *a: pytest.fail("hosts were started"))
    ask(*overrides).refused(*words)


@pytest.mark.parametrize("name", ["smollm", "no such model", "/nowhere/at/all", "models/a/b"])
def test_unknown_models(apb: Any, document: Path, name: str) -> None:
    error = apb("ask", "-d", str(document), "-q", "Who?", f"model={name}").refused(name)
    if name == "smollm":
        assert "Did you mean smollm2-135m" in error["remedy"]


def test_documents_that_cannot_be_read(apb: Any, model: Path, tmp_path: Path) -> None:
    def refused(name: Path | str, *words: str) -> None:
        apb("ask", "-d", str(name), "-q", "Who?", f"model={model}", "cluster=virtual").refused(str(name), *words)

    refused(tmp_path / "missing.txt", "does not exist")
    refused(tmp_path, "is a folder")
    for content, word in (
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"a\0b", "NUL"),
        (b"\xe9t\xe9", "UTF-8"),
    ):
        file = tmp_path / "bad"
        file.write_bytes(content)
        refused(file, word)
    refused("a\0b", "cannot be read")
    if os.geteuid() != 0:  # root reads everything
        file.chmod(0)
        refused(file, "cannot be read")


def test_a_document_needs_a_question(apb: Any, document: Path) -> None:
    apb("ask", "-d", str(document)).refused("needs a question", "-q")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_damaged_model_files(ask: Any, model: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    file = broken / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    ask(f"model={broken}").refused(name)


def test_what_does_not_fit_starts_no_host(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apb.engine._start", lambda *a: pytest.fail("hosts were started"))
    monkeypatch.setattr("launch.prepare._available", lambda: 1_000_000)
    ask().refused("does not fit", "0.0 GB free")


# -- failures that are nobody's mistake ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (HostFailure("it died", rank=2, step="layer 3", peer=1), 1, "HostFailure"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
)
def test_failures(ask: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, kind: str) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("launch.ask.Engine.prefill", fail)
    ran = ask()
    assert ran.code == code and ran.document["error"]["type"] == kind
    assert set(ran.document["error"]) == {"type", "given", "allowed", "remedy", "message"}
    assert "Traceback" not in ran.err
    if code == 1:
        assert "Traceback" in ask("--verbose").err


def test_a_swallowed_interrupt_comes_again() -> None:
    with interruptible(), pytest.raises(KeyboardInterrupt):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        time.sleep(10)


def test_an_interrupt_leaves_its_own_clean_up_alone() -> None:
    cleaned = False
    with interruptible(), pytest.raises(KeyboardInterrupt):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            time.sleep(1.2)
            cleaned = True
    assert cleaned


def test_what_libraries_print_does_not_reach_stdout(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(config: Any) -> None:
        print("hello")  # noqa: T201
        raise _Seen

    monkeypatch.setattr("launch.ask.settle", settle)
    ran = ask()
    assert ran.code == 1 and len(ran.out.splitlines()) == 1 and "hello" in ran.err


# -- free text -----------------------------------------------------------------------------------------


class _Seen(Exception):
    """Ends a command once its prompt is made."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The documents and questions that commands tokenise."""
    found: list[tuple[str, str]] = []

    def prompt(self: Setup, context: str, query: str, **options: Any) -> None:
        found.append((context, query))
        raise _Seen

    monkeypatch.setattr(Setup, "prompt", prompt)
    return found


TRICKY = [
    "--help",
    "-m",
    "a=b",
    "strategy=star",
    "${x}",
    "{a,b}",
    "'\"",
    "é\n\u2028☃ \U0001f600",
    "\\",
    "#",
    "a\r\nb",
]


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(
        st.one_of(st.sampled_from(TRICKY), st.text(min_size=1)).filter(lambda t: t.strip() and "\0" not in t),
        min_size=2,
        max_size=2,
    )
)
def test_any_text_reaches_the_prompt(
    texts: list[str], model: Path, seen: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    document, question = texts
    file = tmp_path_factory.mktemp("any") / "é = {a, b}.txt"
    file.write_bytes(document.encode())
    main(["ask", "-d", str(file), f"model={model}", "-q", question, "cluster=virtual"])
    assert seen.pop() == (document, question)


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_reaches_the_prompt(apb: Any, model: Path, seen: list[tuple[str, str]], text: str) -> None:
    apb("ask", f"model={model}", f"--query={text}x")
    apb("ask", f"model={model}", "--query", f"{text}x")
    assert [question for _, question in seen] == [f"{text}x"] * 2


def test_standard_input(ask: Any, seen: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "piped"
    file.write_bytes("Bonjour à tous,\r\n".encode())
    with file.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        ask("-d", "-")
    assert seen == [("Bonjour à tous,\r\n", "Who sees?")]


@pytest.mark.parametrize(
    ("override", "stop"),
    [
        ("decode.stop=a, b = {c}é", ["a, b = {c}é"]),
        ("decode.stop=['a','b c']", ["a", "b c"]),
        ("decode.stop=\n\n", ["\n\n"]),
        ("decode.stop=null", []),
    ],
)
def test_stop_texts(ask: Any, monkeypatch: pytest.MonkeyPatch, override: str, stop: list[str]) -> None:
    got: list[Any] = []

    def settle(config: Any) -> None:
        got.append(config["decode"]["stop"])
        raise _Seen

    monkeypatch.setattr("launch.ask.settle", settle)
    ask(override)
    assert got == [stop]


# -- sweeps --------------------------------------------------------------------------------------------


def test_a_sweep_keeps_what_succeeded(ask: Any, tmp_path: Path) -> None:
    ran = ask("-m", "strategy=full,star,apb", "cluster.hosts=range(1,3)", f"out={tmp_path}/out")
    runs = ran.document["runs"]
    varied = [r["overrides"][-3:-1] for r in runs]
    assert varied == [[f"strategy={s}", f"cluster.hosts={h}"] for s in ("full", "star", "apb") for h in (1, 2)]
    failed = [r for r in runs if "error" in r]
    assert ran.code == 2 and len(failed) == 1 and "runs on one host" in failed[0]["error"]["message"]
    assert all(set(r) >= KEYS for r in runs if "error" not in r)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0", "1", "2", "3", "4", "5"]
    assert "error" in json.loads((tmp_path / "out" / "1" / "result.json").read_text())


def test_a_sweep_over_models_and_of_one(apb: Any, model: Path, document: Path) -> None:
    common = ("ask", "-m", "-d", str(document), "-q", "Who?", "cluster=virtual", "decode.max_new_tokens=2")
    (only,) = apb(*common, f"model={model}").document["runs"]  # its path has commas
    assert only["model"] == str(model)
    ran = apb(*common, "model=/nowhere/a,/nowhere/b")
    asked = [r["overrides"][-1] for r in ran.document["runs"]]
    assert ran.code == 2 and asked == ["model=/nowhere/a", "model=/nowhere/b"]


def test_the_worst_exit_code_wins(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise HostFailure("it died", rank=0, step="start")

    monkeypatch.setattr("launch.ask.Engine.launch", fail)
    assert ask("-m", "strategy=full,apb", "cluster.hosts=4").code == 1


# -- help, version, other verbs ------------------------------------------------------------------------


def test_help_at_every_level(apb: Any) -> None:
    ran = apb("--help")
    assert ran.code == 0 and all(verb in ran.out for verb in VERBS)
    for verb in VERBS:
        ran = apb(verb, "-h")
        assert ran.code == 0 and f"apb {verb}" in ran.out
    text = apb("ask", "cluster=virtual", "--help").out
    for part in (
        "-d, --document",
        "strategy.anchor_len=null",
        "cluster.hosts=null",
        "decode.top_p=1.0",
        "needle_depth=0.5",
    ):
        assert part in text


def test_version(apb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.2.3")
    ran = apb("--version")
    assert ran.code == 0 and ran.out == "apb 1.2.3\n"


def test_verbs_that_are_no_verbs(apb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    apb().refused("no verb given")
    apb("askk").refused("Did you mean ask")
    apb("bench", "one", "two").refused("'two'")
    apb("serve", "-q", "Who?").refused("takes no -q")
    apb("serve", "-m").refused("takes no -m")
    monkeypatch.setitem(VERBS, "serve", dataclasses.replace(VERBS["serve"], target="launch.no_such_module:run"))
    apb("serve").refused("not built yet", "serve")


def test_plan(apb: Any, model: Path, document: Path) -> None:
    ran = apb("plan", "-d", str(document), "-q", "Who?", f"model={model}", "cluster=virtual", "cluster.hosts=3")
    found = ran.document
    assert ran.code == 0 and found["hosts"] == 3 and found["fits"] is True
    assert [row["host"] for row in found["plan"]["per_host"]] == [0, 1, 2]
    assert "It fits" in ran.err and "passes on" in ran.err


def test_plan_explains_the_choice_of_a_schedule(apb: Any, model: Path) -> None:
    common = ("plan", f"model={model}", "context_tokens=400", "memory_gb=80", "cluster.hosts=4")
    assert apb(*common).document["burst"] is None
    ran = apb(*common, "strategy=ring", "burst.explain=true", "burst.nodes=2", "burst.machine=cuda")
    found = ran.document["burst"]
    rows = {row["schedule"]: row for row in found["candidates"]}
    assert set(rows) == {"ring", "double_ring", "burst", "allgather", "ulysses", "usp"}
    assert found["schedule"] == next(iter(rows)) and found["nodes"] == 2 and found["layout"] == "zigzag"
    sent = ran.document["plan"]["bytes_by_kind"]["kv"]  # by all layers
    assert rows["ring"]["intra_bytes"] + rows["ring"]["inter_bytes"] == sent / found["layers"]
    assert all(row["exposed_ms"] >= 0 for row in rows.values())
    assert "exposed ms" in ran.err and found["reason"] in ran.err
    apb(*common, "burst.explain=true", "burst.nodes=5").refused("nodes", "1 to 4")
    apb(*common, "burst.explain=true", "burst.machine=abacus").refused("cpu", "cuda")
    for name, hosts in (("full", 1), ("usp", 4)):
        words = (*common[:-1], f"strategy={name}", f"cluster.hosts={hosts}", "burst.explain=true")
        assert apb(*words).document["burst"]["schedule"]


def test_plan_of_lengths_alone(apb: Any, model: Path, document: Path) -> None:
    common = ("plan", f"model={model}")
    found = apb(*common, "context_tokens=400", "query_tokens=40", "memory_gb=80").document
    assert (found["context_tokens"], found["query_tokens"]) == (400, 40)
    assert found["memory_available_bytes"] == 80_000_000_000
    apb(*common, "context_tokens=400", "memory_gb=0.0001").refused("does not fit", "0.0 GB free")
    apb(*common, "context_tokens=4000").refused("longer than the model's context")
    apb(*common, "context_tokens=1").refused("context_tokens leaves no room")
    apb(*common, "context_tokens=400", "query_tokens=2").refused("query_tokens leaves no room")
    apb(*common, "context_tokens=400", "-d", str(document), "-q", "Who?").refused("one of them")


# -- configuration and default document ----------------------------------------------------------------


def test_configuration_files_name_exactly_the_options() -> None:
    def keys(path: str) -> set[str]:
        return set(yaml.safe_load(resources.files("conf").joinpath(path).read_text()))

    def options(kind: Any) -> set[str]:
        return {f.name for f in dataclasses.fields(kind)}

    for name in STRATEGIES:
        assert keys(f"strategy/{name}.yaml") == {"name", *options(strategy(name))}
    for name in COMPRESSORS:
        assert keys(f"compress/{name}.yaml") == {"name", *options(compressor(name))}
    for name in ("ray", "virtual", "torchrun"):
        assert keys(f"cluster/{name}.yaml") <= options(ClusterSettings)
    assert keys("decode/autoregressive.yaml") == options(DecodeSettings)


def test_every_setting_is_explained() -> None:
    from launch.help import verb_help

    for verb in ("ask", "plan"):
        for line in verb_help(verb).splitlines():
            word, _, rest = line.strip().partition(" ")
            assert "=" not in word or "CHOICE" in word or rest, line


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_default_document(depth: float) -> None:
    text = default_document(depth)
    assert text.count(FACT) == 1 and text == default_document(depth)
    assert 20_000 < len(text) < 30_000
    assert abs(text.index(FACT) / len(text) - depth) < 0.06


def test_plain_progress_says_how_much_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.display.PLAIN_PAUSE_S", 0.0)
    with Display().progress() as report:
        for done in range(4):
            report("Prefill", done, 30)
    assert "Prefill: 3 of 30" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_program(model: Path, document: Path, tmp_path: Path) -> None:
    words = ["ask", f"model={model}", "-d", "-", "-q", "Who?", "cluster=virtual", "decode.max_new_tokens=2"]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        input=document.read_bytes(),
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert set(json.loads(done.stdout.splitlines()[-1])) >= KEYS
    assert b"Warning" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["document.txt"]
