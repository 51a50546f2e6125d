"""Whose machine code runs: what was compiled here, what this user trusts, what a trusted key has signed."""

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.conftest import Command
from tests.faults.libraries_code import with_illegal_instructions
from tests.workshop import THREADS, Workshop, copy_folder, tiny_profile

from engram_runtime import LLM, Bundle
from engram_runtime.bundle import sealed
from engram_runtime.errors import BundleError, EngramError, RequestError, TargetError
from engram_runtime.executors import tvm_library
from engram_runtime.library import LibraryInfo, find_library
from engram_runtime.strict_json import read_json_object
from engram_runtime.trust import trial
from engram_runtime.trust.code import checked_code
from engram_runtime.trust.levels import Trust, parse_trust
from engram_runtime.trust.library import reason, trusted_library
from engram_runtime.trust.records import record_of

PROMPT = "The tide comes in"
UNTRUSTED = "was neither compiled by this user here nor signed by a key that is trusted here"
OTHER = "5" * 64


@pytest.fixture
def bundle(workshop: Workshop, tmp_path: Path) -> Bundle:
    """Return a bundle with a library that was compiled here."""
    return Bundle.open(copy_folder(workshop.ready().path, tmp_path / "bundle"))


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Be a user who hasn't compiled anything; returns the folder of what this one says."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "engram-edge"


def library_of(bundle: Bundle) -> tuple[Path, LibraryInfo]:
    return find_library(Bundle.open(bundle.path))


def refusal(bundle: Bundle, trust: Trust | None = None) -> str:
    """Return why a bundle isn't run."""
    with pytest.raises(EngramError) as caught, LLM(bundle.path, threads=THREADS, trust=trust or Trust()):
        pass
    return str(caught.value)


def unsigned(path: Path) -> str:
    return f"there is no signature {path}; ask who made it to run engram sign, or leave out --trust signed"


def tokens_of(bundle: Bundle, trust: Trust | None = None) -> tuple[int, ...]:
    with LLM(bundle.path, threads=THREADS, trust=trust or Trust()) as llm:
        return tuple(llm.generate(PROMPT, max_tokens=6).token_ids)


def no_trial(*arguments: object, **options: object) -> None:
    """Stand in for the run in a process of its own, which takes two seconds; one test has it."""


def replace_code(bundle: Bundle, code: bytes) -> None:
    """Put other code into a library as somebody does who writes digests too."""
    folder, info = library_of(bundle)
    (folder / info.library).write_bytes(code)
    raw = read_json_object(folder / "compile.json")
    raw["sha256"]["library"] = hashlib.sha256(code).hexdigest()
    (folder / "compile.json").write_text(json.dumps(raw))


def test_what_was_compiled_here_runs(bundle: Bundle) -> None:
    folder, info = library_of(bundle)
    assert reason(bundle, folder, info) == "compiled here"
    assert trusted_library(bundle) == (folder, info)


def test_what_others_compiled_is_not_loaded(
    bundle: Bundle, stranger: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    folder, info = library_of(bundle)
    monkeypatch.setattr(tvm_library, "checked_code", pytest.fail)
    sentence = (
        f"library {folder} {UNTRUSTED}; run: engram compile {bundle.path} --target {info.target} --rebuild, or, if you "
        f"trust who made it: engram trust {bundle.path} --target {info.target}"
    )
    assert refusal(bundle) == sentence
    assert command("engram", "serve", bundle.path).err == f"engram: {sentence}\n"
    assert not stranger.exists()


def test_a_rebuild_throws_all_libraries_away_and_runs(
    bundle: Bundle, stranger: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = library_of(bundle)[1].target
    (bundle.path / "lib" / "elsewhere").mkdir()
    monkeypatch.setattr("engram_compilers.cli.load_profile", lambda name: tiny_profile(decode_tokens=(1,)))
    assert command("engram", "compile", bundle.path, "--rebuild").code == 0
    assert [path.name for path in (bundle.path / "lib").iterdir()] == [own]
    assert len(tokens_of(bundle)) == 6


@pytest.mark.parametrize("part", ["library", "runtime"])
def test_a_file_that_is_not_what_was_compiled_is_not_loaded(
    bundle: Bundle, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, info = library_of(bundle)
    monkeypatch.setattr("tvm_ffi.get_global_func", lambda *_, **__: None)
    monkeypatch.setattr(tvm_library, "_installed_runtime", lambda: None)
    monkeypatch.setattr("ctypes.CDLL", lambda *_: None)
    path = folder / info.files[part]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert refusal(bundle) == f"{path} is not what was compiled; compile the bundle again"


def test_who_changes_digests_with_the_code_is_not_trusted(bundle: Bundle) -> None:
    replace_code(bundle, b"evil")
    assert UNTRUSTED in refusal(bundle)


def test_a_trusted_library_runs_in_a_process_of_its_own_first(bundle: Bundle, stranger: Path, command: Command) -> None:
    folder, info = library_of(bundle)
    shown = command("engram", "inspect", bundle.path, "--json").json["libraries"]
    assert [each["sha256"] for each in shown] == [info.digest]
    said = command("engram", "trust", bundle.path, "--sha256", info.digest)
    assert (said.code, said.out) == (0, f"{folder} is trusted: {info.digest}\n")
    assert len(tokens_of(bundle)) == 6
    (tried,) = (stranger / "trials").iterdir()
    assert tried.name.startswith(info.digest)
    assert reason(bundle, folder, info) == "trusted here"
    assert command("engram", "trust", bundle.path, "--forget").out == f"{folder} is trusted no longer: {info.digest}\n"
    assert command("engram", "trust", bundle.path, "--forget").out == f"{folder} was not trusted: {info.digest}\n"
    assert UNTRUSTED in refusal(bundle)


def test_code_that_ends_its_process_ends_no_other(bundle: Bundle, stranger: Path, command: Command) -> None:
    folder, info = library_of(bundle)
    replace_code(bundle, with_illegal_instructions((folder / info.library).read_bytes(), 0.0, 1.0))
    assert command("engram", "trust", bundle.path).code == 0
    assert refusal(bundle) == (
        f"library {folder} was ended by signal 4 when it ran in a process of its own; compile the bundle for this "
        f"machine"
    )
    assert not (stranger / "trials").exists()


def test_trusting_another_library_than_the_one_that_was_meant(bundle: Bundle, stranger: Path, command: Command) -> None:
    folder, info = library_of(bundle)
    said = command("engram", "trust", bundle.path, "--sha256", OTHER)
    assert (said.code, said.err) == (
        4,
        f"engram: library {folder} has SHA-256 {info.digest}, expected {OTHER}; get the one that was meant\n",
    )
    assert record_of(info.digest) is None
    assert command("engram", "trust", bundle.path, "--sha256", OTHER, "--forget") == said


def test_a_pipe_in_a_librarys_place_is_not_waited_for(bundle: Bundle, stranger: Path, command: Command) -> None:
    folder, info = library_of(bundle)
    (folder / info.weights).unlink()
    os.mkfifo(folder / info.weights)
    said = command("engram", "trust", bundle.path)
    assert (said.code, said.err) == (3, f"engram: {info.weights} in bundle {folder} is not a plain file\n")


def test_a_damaged_library_is_not_trusted(bundle: Bundle, stranger: Path, command: Command) -> None:
    folder, info = library_of(bundle)
    (folder / info.weights).write_bytes(b"\0" * info.weights_bytes)
    said = command("engram", "trust", bundle.path)
    assert said.err == f"engram: {folder / info.weights} is not what was compiled; compile the bundle again\n"
    assert record_of(info.digest) is None


def test_pinned_bundles_are_those_of_the_digests(
    bundle: Bundle, stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_runtime.trust.library.require_trial", no_trial)
    manifest = hashlib.sha256((bundle.path / "engram.json").read_bytes()).hexdigest()
    code = library_of(bundle)[1].digest
    assert refusal(bundle, parse_trust("local", (code,))) == (
        f"{bundle.path / 'engram.json'} has SHA-256 {manifest}, none of those of --sha256; get the bundle that was "
        f"meant"
    )
    assert UNTRUSTED in refusal(bundle, parse_trust("local", (manifest,)))
    assert len(tokens_of(bundle, parse_trust("local", (manifest, code.upper())))) == 6
    assert not stranger.exists()


def test_a_digest_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        parse_trust("local", ("abc",))
    assert str(caught.value) == "--sha256 is 'abc', expected 64 hexadecimal digits; engram inspect shows them"


def pinned(bundle: Bundle) -> Trust:
    manifest = hashlib.sha256((bundle.path / "engram.json").read_bytes()).hexdigest()
    return Trust(pinned=(manifest,))


@pytest.mark.parametrize("name", ["tokenizer.json", "engram.json", "lib/{target}/weights.bin", "."])
def test_strictly_no_file_may_be_everybodys_to_write(bundle: Bundle, name: str) -> None:
    path = bundle.path / name.format(target=library_of(bundle)[1].target)
    path.chmod(path.stat().st_mode | 0o002)
    assert len(tokens_of(bundle)) == 6
    assert refusal(bundle, pinned(bundle)) == f"{path} can be written by everybody; run: chmod o-w {path}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away: run as root")
def test_strictly_no_file_may_belong_to_another_user(bundle: Bundle) -> None:
    path = bundle.path / "tokenizer.json"
    os.chown(path, 12345, -1)
    assert refusal(bundle, pinned(bundle)) == (
        f"{path} belongs to user 12345, who can change it; take a copy of your own, or leave out --trust and --sha256"
    )


def test_strictly_contents_are_checked_when_a_bundle_is_opened(bundle: Bundle) -> None:
    path = bundle.path / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"the", b"teh", 1))
    Bundle.open(bundle.path)
    with pytest.raises(BundleError, match=r"^tokenizer.json has SHA-256 \w+, the manifest says \w+; export again$"):
        Bundle.open(bundle.path, pinned(bundle))


def test_records_that_others_can_write_are_not_relied_on(bundle: Bundle, stranger: Path, command: Command) -> None:
    command("engram", "trust", bundle.path)
    (stranger / "libraries").chmod(0o770)
    assert refusal(bundle) == (
        f"{stranger / 'libraries'} can be written by others; run: chmod go-w {stranger / 'libraries'}"
    )


def test_folders_of_records_are_their_owners_alone(bundle: Bundle, stranger: Path, command: Command) -> None:
    command("engram", "trust", bundle.path)
    assert [path.stat().st_mode & 0o777 for path in (stranger, stranger / "libraries")] == [0o700, 0o700]


def test_records_are_relied_on_where_a_users_own_group_may_write(
    bundle: Bundle, stranger: Path, command: Command
) -> None:
    usual = os.umask(0o002)
    try:
        assert command("engram", "trust", bundle.path).code == 0
        assert len(tokens_of(bundle)) == 6
    finally:
        os.umask(usual)
    kept = [path for path in stranger.rglob("*") if path.is_file()]
    assert [path.stat().st_mode & 0o777 for path in kept] == [0o600, 0o600]  # the record, and that it was tried


@pytest.mark.parametrize("text", ["", '{"version": 2}', '{"version": 1, "how": "no", "target": "", "place": ""}'])
def test_a_damaged_record_is_an_error(bundle: Bundle, stranger: Path, command: Command, text: str) -> None:
    command("engram", "trust", bundle.path)
    (stranger / "libraries" / library_of(bundle)[1].digest).write_text(text)
    assert refusal(bundle).endswith("; delete it and compile or trust the library again")


def test_what_was_checked_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"code")
    with checked_code(path, hashlib.sha256(b"code").hexdigest()) as place:
        path.write_bytes(b"evil")
        assert (place.read_bytes(), place.name) == (b"code", "model.so")
        with pytest.raises(OSError, match="not permitted"):
            place.write_bytes(b"evil")
        first = place
    with checked_code(path, hashlib.sha256(b"evil").hexdigest()) as place:
        assert place != first
    assert not first.exists()


def test_a_run_that_takes_too_long_is_no_run(bundle: Bundle, stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("engram", 1)

    folder, info = library_of(bundle)
    monkeypatch.setattr("subprocess.run", late)
    with pytest.raises(TargetError) as caught:
        trial.require_trial(bundle, folder, info)
    assert str(caught.value) == f"library {folder} had not run after 300 s; compile the bundle again"


def test_whatever_code_writes_is_told(
    bundle: Bundle, stranger: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, info = library_of(bundle)
    (python := tmp_path / "python").write_text("#!/bin/sh\nprintf 'no \\377 text' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(TargetError) as caught:
        trial.require_trial(bundle, folder, info)
    assert str(caught.value) == f"library {folder} failed when it ran in a process of its own: no \ufffd text"


@pytest.fixture
def key(tmp_path: Path, command: Command) -> Path:
    """Return a private key; the public one is beside it."""
    path = tmp_path / "maker.key"
    said = command("engram", "keys", "new", path)
    assert (said.code, path.stat().st_mode & 0o777) == (0, 0o600)
    return path


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def sign(bundle: Bundle, key: Path, command: Command) -> None:
    done = command("engram", "sign", bundle.path, "--key", key)
    assert done.code == 0, done.err


def test_what_a_trusted_key_signed_runs(
    bundle: Bundle, stranger: Path, key: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_runtime.trust.library.require_trial", no_trial)
    command("engram", "trust", bundle.path)
    sign(bundle, key, command)
    command("engram", "trust", bundle.path, "--forget")
    signature = library_of(bundle)[0] / "compile.json.sig"
    identity = read_json_object(signature)["key"]
    assert refusal(bundle) == (
        f"{signature} is by key {identity}, which is not trusted here; if its owner is, run: engram trust KEY.pub"
    )
    assert command("engram", "trust", public(key)).out == f"{public(key)} is trusted: {identity}\n"
    assert command("engram", "keys", "list").out == f"{identity}\n"
    assert tokens_of(bundle) == tokens_of(bundle, Trust(signed=True))
    assert command("engram", "trust", public(key), "--forget").out.startswith(f"{public(key)} is trusted no longer")
    assert "not trusted here" in refusal(bundle)


def test_signed_means_that_manifest_and_library_are(bundle: Bundle, key: Path, command: Command) -> None:
    strictly = Trust(signed=True)
    assert refusal(bundle, strictly) == unsigned(bundle.path / "engram.json.sig")
    sign(bundle, key, command)
    command("engram", "trust", public(key))
    signature = library_of(bundle)[0] / "compile.json.sig"
    signature.unlink()
    assert refusal(bundle, strictly) == unsigned(signature)


@pytest.mark.parametrize("spoil", ["manifest", "library", "swapped"])
def test_a_signature_of_something_else_is_none(bundle: Bundle, key: Path, command: Command, spoil: str) -> None:
    sign(bundle, key, command)
    command("engram", "trust", public(key))
    manifest, library = bundle.path / "engram.json", library_of(bundle)[0] / "compile.json"
    signed = manifest.with_name("engram.json.sig"), library.with_name("compile.json.sig")
    changes: dict[str, Callable[[], object]] = {
        "manifest": lambda: manifest.write_bytes(sealed(read_json_object(manifest) | {"producer": "somebody"})),
        "library": lambda: replace_code(bundle, b"evil"),
        "swapped": lambda: signed[0].write_bytes(signed[1].read_bytes()),
    }
    changes[spoil]()
    expected = signed[1] if spoil == "library" else signed[0]
    assert refusal(bundle, Trust(signed=True)) == (
        f"{expected} is not a signature of what is there; have it signed again"
    )


def test_what_strangers_compiled_is_not_signed(bundle: Bundle, stranger: Path, key: Path, command: Command) -> None:
    said = command("engram", "sign", bundle.path, "--key", key)
    assert (said.code, said.err) == (4, f"engram: {refusal(bundle)}\n")
    assert UNTRUSTED in said.err
    assert not list(bundle.path.rglob("*.sig"))


def test_what_is_damaged_is_not_signed(bundle: Bundle, key: Path, command: Command) -> None:
    folder, info = library_of(bundle)
    (folder / info.weights).write_bytes(b"\0" * info.weights_bytes)
    assert command("engram", "sign", bundle.path, "--key", key).code == 4
    assert not list(bundle.path.rglob("*.sig"))


def test_files_that_are_no_keys(bundle: Bundle, key: Path, command: Command) -> None:
    said = [
        command("engram", "sign", bundle.path, "--key", public(key)).err,
        command("engram", "trust", key).err,
        command("engram", "keys", "new", key).err,
        command("engram", "trust", public(key), "--sha256", OTHER).err,
    ]
    assert said == [
        f"engram: {public(key)} holds no private key without a passphrase; make one with engram keys new\n",
        f"engram: {key} holds no public key; engram keys new makes one beside each private key\n",
        f"engram: {key} exists; choose another place\n",
        "engram: --target and --sha256 are of a bundle's library, not of a key; leave them out\n",
    ]


def test_a_key_with_a_passphrase_is_refused(bundle: Bundle, tmp_path: Path, command: Command) -> None:
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"a passphrase"),
        )
    )
    assert command("engram", "sign", bundle.path, "--key", locked).err == (
        f"engram: {locked} holds no private key without a passphrase; make one with engram keys new\n"
    )


def test_the_doctor_says_whose_the_library_is(bundle: Bundle, stranger: Path, command: Command) -> None:
    def said() -> str:
        findings = command("engram", "doctor", bundle.path, "--json").json["findings"]
        return str(next(each["detail"] for each in findings if each["name"] == "trust"))

    name = library_of(bundle)[0].name
    assert said() == f"{name} {UNTRUSTED}"
    command("engram", "trust", bundle.path)
    assert said() == f"{name} is trusted here"
