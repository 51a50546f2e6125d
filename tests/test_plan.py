"""Plans: sizes equal those of an export, numbers of published models worked out by hand, verdicts word by word."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import big_models
from tests.big_models import QWEN_EXPERTS, QWEN_HIDDEN, QWEN_INNER, QWEN_LAYERS
from tests.conftest import Command
from tests.tiny import TinyModel, TinySite
from tests.tiny_families import FAMILIES
from tests.tiny_gemma import CONFIGS, save_gemma
from tests.workshop import Workshop

from engram_export.checkpoint import open_checkpoint
from engram_export.formats import weight_format
from engram_export.outlines.checkpoint import outline_checkpoint
from engram_export.outlines.decoders import DECODERS, take_inventory
from engram_export.plan import export_sizes, plan_export
from engram_export.source import open_source
from engram_runtime.errors import BundleError, CheckpointError, RequestError
from engram_runtime.library import find_library
from engram_runtime.memory import FreeMemory
from engram_runtime.planning.bundle_outline import EXPERT_OPERATORS, outline_bundle
from engram_runtime.planning.disks import DISKS, SOURCES
from engram_runtime.planning.machine import Disk, Machine, kind_of_disk, place_on
from engram_runtime.planning.money import Prices
from engram_runtime.planning.need import FITS, FROM_DISK, WONT_FIT, Need, judge_memory
from engram_runtime.planning.onnx_nodes import node_numbers
from engram_runtime.planning.outline import EXPERTS, Outline, Table, layers_before, tables_on
from engram_runtime.planning.plan import make_plan, pages_of
from engram_runtime.planning.speed import CACHE_SHARE, WEIGHT_SHARE, decode_s
from engram_runtime.tables.policy import TableFacts

GIB = 1 << 30
QUANTS = ["none", "int8", "int4"]
UNKNOWN_DISK = Disk(facts=None, words="not measured")


def machine(ram: int = 64 * GIB, *, disk: Disk = UNKNOWN_DISK, free: int | None = None) -> Machine:
    return Machine(
        memory=FreeMemory(num_bytes=ram),
        bandwidth_gb_s=50.0,
        measured_bandwidth=False,
        threads=2,
        target="x86-64-avx512-vnni",
        kernels="avx512_vnni",
        chunk=64,
        disk=disk,
        free_disk_bytes=free,
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return big_models.qwen(tmp_path_factory.mktemp("big") / "qwen")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return big_models.deepseek(tmp_path_factory.mktemp("big") / "deepseek")


def assert_equals_an_export(checkpoint: Path, quant: str) -> None:
    source = open_source(checkpoint, engram=None, context=None)
    skeleton = source.skeleton(weight_format(quant, source.kept_type))
    outline = outline_checkpoint(checkpoint, quant=quant, table_dtype=None, context=None)
    planned = plan_export(source, weight_format(quant, source.kept_type), "copy", None)
    assert outline.stored() == planned.weights_bytes
    assert sorted(map(str, outline.states)) == sorted(map(str, skeleton.state_specs()))
    assert outline.cache_bytes(1) == planned.cache_bytes_per_token
    assert outline.state_bytes == planned.state_bytes
    assert {(table.site, table.num_rows, table.record_bytes, table.rows) for table in outline.tables} == {
        (site.site, site.rows, site.record_bytes, site.rows_per_token) for site in planned.sites
    }
    assert outline.export is not None
    if not (quant == "int4" and source.architecture.text.family == "llama"):  # calibrated, which this plan is not
        assert outline.export.peak_bytes == planned.peak_memory_bytes


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_export_of_a_family(workshop: Workshop, family: str, quant: str) -> None:
    assert_equals_an_export(workshop.family(FAMILIES[family][0]), quant)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_export_of_further_configurations(workshop: Workshop, family: str, number: int) -> None:
    assert_equals_an_export(workshop.family(FAMILIES[family][number]), "int4")


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_the_export_of_gemma(tmp_path: Path, name: str) -> None:
    assert_equals_an_export(save_gemma(tmp_path / "checkpoint", name), "int8")


@pytest.mark.parametrize("model", [TinyModel(), TinyModel(tied=False)], ids=["tied", "untied"])
def test_sizes_are_those_of_the_export_of_a_site(workshop: Workshop, model: TinyModel) -> None:
    assert_equals_an_export(workshop.checkpoint(model, TinySite()), "int4")


def test_every_family_that_is_exported_can_be_planned() -> None:
    from engram_export.families import FAMILIES as EXPORTED

    assert DECODERS.keys() == EXPORTED.keys()


def test_shapes_for_the_peak_are_those_of_the_export(workshop: Workshop) -> None:
    checkpoint = workshop.family(FAMILIES["qwen4_exp"][0])
    source = open_source(checkpoint, engram=None, context=None)
    sizes = export_sizes(source, source.skeleton(weight_format("int8", source.kept_type)))
    made = take_inventory(open_checkpoint(checkpoint), "int8", source.context_length, bfloat16=False)
    assert sorted(made.shapes.values()) == sorted(sizes.shapes)


def test_a_bundle_is_told_as_its_library_has_it(workshop: Workshop) -> None:
    bundle = workshop.ready()
    _, library = find_library(bundle)
    outline = outline_bundle(bundle)
    assert outline.packed() == sum(tensor.end - tensor.offset for tensor in library.tensors)
    assert outline.target == library.target
    assert outline.export is None


def test_a_bundle_is_told_before_it_is_compiled_as_its_checkpoint_was(workshop: Workshop) -> None:
    checkpoint = workshop.family(FAMILIES["mixtral"][0])
    made = outline_bundle(workshop.bundle(checkpoint, quant="int8"))
    planned = outline_checkpoint(checkpoint, quant="int8", table_dtype=None, context=None)
    assert (made.stored(), made.packed()) == (planned.stored(), planned.packed())
    assert (made.expert_bytes, made.whole_bytes) == (planned.expert_bytes, planned.whole_bytes)
    assert made.parameters == planned.parameters
    assert made.attention_width == planned.attention_width


def test_experts_a_token_reads_stand_in_the_graph(workshop: Workshop, tmp_path: Path) -> None:
    bundle = workshop.bundle(workshop.family(FAMILIES["qwen3_5_moe"][0]), quant="int8")
    graph = bundle.file(bundle.manifest.decoder.file)
    assert node_numbers(graph, EXPERT_OPERATORS, "k") == [2, 2, 2]
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(graph.read_bytes()[:-7])
    broken.write_bytes(b"\x3b" + b"{}")
    with pytest.raises(BundleError, match=f"{broken} is not an ONNX file: field 7 is of kind 3; export"):
        node_numbers(broken, EXPERT_OPERATORS, "k")


def test_qwen_is_planned_from_config_and_index(qwen: Path) -> None:
    outline = outline_checkpoint(qwen, quant="int8", table_dtype=None, context=None)
    expert_bytes = 2 * QWEN_INNER * (QWEN_HIDDEN + 4) + QWEN_HIDDEN * (QWEN_INNER + 4)  # int8 and a scale an output
    (table,) = outline.tables
    assert outline.stored(EXPERTS) == QWEN_LAYERS * QWEN_EXPERTS * expert_bytes
    assert outline.expert_bytes == QWEN_LAYERS * 10 * expert_bytes
    assert (table.num_rows, table.record_bytes, table.rows) == (320_001_536, 160, 16)
    assert table.num_bytes == 51_200_245_760
    assert table.layers_before == 1 / 60
    assert outline.cache_bytes(1) == 15 * 4 * (2 * 2 * 256 + 128)  # keys and values of 2 heads, and an index key
    assert 125e9 < outline.parameters < 126e9  # published as 125B
    assert outline.source_bytes is None


def test_deepseek_is_told_though_only_its_tables_are_exported(deepseek: Path) -> None:
    outline = outline_checkpoint(deepseek, quant=None, table_dtype=None, context=None)
    experts = 40 * 384 * 3 * 5120 * 2304 * 17 // 32  # fp4 with a byte of scale for 32
    tables = (384_006_168 + 384_016_682) * 264
    assert [table.num_bytes for table in outline.tables] == [384_006_168 * 264, 384_016_682 * 264]
    assert outline.foreign == {"experts": experts, "all other weights": big_models.DEEPSEEK_BYTES - experts - tables}
    assert outline.stored() == 2 * (25600 * (6144 + 4) + 4 * 5120 * 4)
    assert [table.rows for table in outline.tables] == [24, 24]
    assert not outline.runs


def test_repacked_tables_are_planned_smaller(qwen: Path) -> None:
    (table,) = outline_checkpoint(qwen, quant=None, table_dtype="int4", context=None).tables
    assert table.record_bytes == 160 // 2 + 5 * 2  # a float16 scale for 32 columns


@pytest.mark.parametrize("model", ["qwen", "deepseek"])
def test_plans_import_no_torch(request: pytest.FixtureRequest, model: str) -> None:
    folder = request.getfixturevalue(model)
    script = (
        "import sys; from engram_runtime.cli import cli\n"
        f"cli(['plan', {str(folder)!r}, '--disk', 'nvme', '--bandwidth', '30'], standalone_mode=False)\n"
        "assert not {'torch', 'onnx', 'tvm'} & sys.modules.keys()"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_the_command_says_what_to_type_next(qwen: Path, command: Command) -> None:
    arguments = ("--ram", "256GiB", "--disk", "nvme", "--bandwidth", 100, "--target", "x86-64-v3", "--context", 4096)
    outcome = command("engram", "plan", qwen, *arguments, "--json")
    assert outcome.code == 0
    assert outcome.json["verdict"] == FITS
    assert outcome.json["commands"] == [
        f"engram-export {qwen} -o qwen.engram --quant int8 --context 4096",
        "engram compile qwen.engram --target x86-64-v3",
        "engram run qwen.engram 'The capital of France is'",
    ]


def test_the_command_ends_with_4_where_a_model_wont_fit(qwen: Path, command: Command) -> None:
    outcome = command("engram", "plan", qwen, "--ram", "4GiB", "--disk", "nvme", "--bandwidth", 30)
    assert outcome.code == 4
    last = outcome.out.splitlines()[-1]
    assert last == "won't fit: it takes 5.6 GiB of memory beside the experts, there are 4.0 GiB"


def test_the_command_says_that_only_tables_can_be_exported(deepseek: Path, command: Command) -> None:
    outcome = command("engram", "plan", deepseek, "--disk", "nvme", "--bandwidth", 30)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-2:] == [
        "tables only: of deepseek_v41 only tables and their sites can be exported",
        f"  $ engram-export {deepseek} -o deepseek.engram --tables-only --quant int8",
    ]


def test_the_command_compares_a_run_with_what_was_predicted(workshop: Workshop, command: Command) -> None:
    bundle = workshop.ready().path
    outcome = command(
        "engram", "plan", bundle, "--ram", "1GiB", "--disk", "nvme", "--bandwidth", 30, "--check", "--json"
    )
    assert outcome.code == 0
    rows = outcome.json["check"]
    assert list(rows) == ["decode after 0, tok/s", "decode after 48, tok/s", "prefill 48, tok/s", "resident memory, MB"]
    memory = rows["resident memory, MB"]
    assert memory["predicted_over_measured"] == pytest.approx(memory["predicted"] / memory["measured"], rel=1e-3)


REFUSED = [
    (["--context", 300_000], "context is 300000, this model takes 1 to 262144 tokens"),
    (["--watts", 15], "--watts and --electricity say what power costs together; give both or neither"),
    (["--check", "--disk", "nvme"], "--check runs a compiled bundle, {path} is none; export and compile it first"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_options_that_have_no_sense_are_refused(
    qwen: Path, command: Command, arguments: Sequence[object], message: str
) -> None:
    outcome = command("engram", "plan", qwen, "--bandwidth", 30, *arguments)
    assert (outcome.code, outcome.err.splitlines()[-1]) == (2, f"engram: {message.format(path=qwen)}")


def test_a_path_that_leads_nowhere_is_called_so(tmp_path: Path, command: Command) -> None:
    outcome = command("engram", "plan", path := tmp_path / "nosuch")
    sentence = f"{path} does not exist; give a bundle, a folder with config.json or a .gguf file"
    assert (outcome.code, outcome.err) == (2, f"engram: {sentence}\n")


def test_an_unknown_family_is_refused(tmp_path: Path) -> None:
    folder = big_models.qwen(tmp_path / "other")
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    with pytest.raises(CheckpointError, match="architecture 'mamba2' is not supported"):
        outline_checkpoint(folder, quant=None, table_dtype=None, context=None)


def need(experts: int = 0, least: int = GIB) -> Need:
    return Need(program=0, weights=least, experts=experts, caches=0, states=0, tables=0)


VERDICTS = [
    (need(), 2 * GIB, 50.0, FITS, "it takes 1.0 GiB of 2.0 GiB"),
    (need(), GIB - 1, 50.0, WONT_FIT, "it takes 1.0 GiB of memory, there are 1024.0 MiB"),
    (need(GIB), GIB // 2, None, WONT_FIT, "it takes 1.0 GiB of memory beside the experts, there are 512.0 MiB"),
    (
        need(GIB),
        GIB + GIB // 4,
        1.25,
        FROM_DISK,
        "75% of the experts don't fit in 1.2 GiB and are read from the disk for every token: at best 1.2 tok/s",
    ),
    (
        need(GIB),
        GIB,
        None,
        FROM_DISK,
        "100% of the experts don't fit in 1.0 GiB and are read from the disk for every token: "
        "at a rate unknown, as the disk is",
    ),
]


@pytest.mark.parametrize(("takes", "memory", "rate", "kind", "reason"), VERDICTS)
def test_verdicts_say_why(takes: Need, memory: int, rate: float | None, kind: str, reason: str) -> None:
    verdict = judge_memory(takes, memory, rate)
    assert (verdict.kind, verdict.reason) == (kind, reason)


def test_a_disk_that_is_too_small_is_a_verdict(qwen: Path) -> None:
    outline = outline_checkpoint(qwen, quant=None, table_dtype=None, context=None)
    plan = make_plan(outline, machine(512 * GIB, free=GIB), positions=1)
    assert (plan.verdict.kind, plan.commands) == (WONT_FIT, [])
    assert plan.verdict.reason == "it writes 283.3 GiB, 1.0 GiB of disk are free here"


@pytest.fixture(scope="module")
def planned_qwen(qwen: Path) -> Outline:
    return tables_on(outline_checkpoint(qwen, quant=None, table_dtype=None, context=None), place_on("nvme"))


RANKS = {WONT_FIT: 0, FROM_DISK: 1, FITS: 2}
SIZES = st.integers(min_value=0, max_value=400 * GIB)


@given(less=SIZES, more=SIZES)
def test_more_memory_never_worsens_the_verdict(planned_qwen: Outline, less: int, more: int) -> None:
    less, more = sorted((less, more))
    plans = [make_plan(planned_qwen, machine(ram, disk=kind_of_disk("nvme")), positions=512) for ram in (less, more)]
    ranks = [RANKS[plan.verdict.kind] for plan in plans]
    rates = [plan.rates.decode[0] for plan in plans if plan.rates is not None]
    assert ranks == sorted(ranks)
    assert rates == sorted(rates)


def test_a_token_takes_its_weights_and_its_cache_over_their_shares_of_the_bandwidth(workshop: Workshop) -> None:
    outline = outline_bundle(workshop.ready())
    weights, cache = outline.whole_bytes / (50e9 * WEIGHT_SHARE), outline.cache_bytes(64) / (50e9 * CACHE_SHARE)
    assert decode_s(outline, machine(), 64) == pytest.approx(weights + cache)


def table(record_bytes: int, *, rows: int = 16, parts: int = 1) -> Table:
    facts = TableFacts(
        site="layer_1",
        num_bytes=100 * GIB,
        reads=rows * parts,
        external=False,
        leased=True,
        path=Path("rows"),
        place=place_on("hdd"),
    )
    return Table(num_rows=1, record_bytes=record_bytes, rows=rows, parts=parts, layers_before=0.5, facts=facts)


@pytest.mark.parametrize(("record_bytes", "pages"), [(256, 16.0), (4097, 32.0), (161, 16 * (1 + 160 / 4096))])
def test_rows_lie_on_a_page_and_as_often_as_they_straddle_on_two(record_bytes: int, pages: float) -> None:
    assert pages_of(table(record_bytes)) == pages


def test_what_a_table_makes_wait_is_what_the_layers_before_it_leave(workshop: Workshop) -> None:
    outline = dataclasses.replace(outline_bundle(workshop.ready()), tables=[table(256)])
    (wait,) = make_plan(outline, machine(disk=kind_of_disk("hdd")), positions=64).tables
    assert wait.token_s == pytest.approx(16 / 150)
    assert wait.token_wait_s == pytest.approx(16 / 150 - decode_s(outline, machine(), 0) / 2)
    assert wait.prompt_s == pytest.approx(2048 * 16 / 150)


def test_a_table_in_memory_makes_nothing_wait(workshop: Workshop) -> None:
    plan = make_plan(outline_bundle(workshop.ready()), machine(), positions=64)
    assert [(wait.choice.io, wait.token_wait_s, wait.prompt_wait_s) for wait in plan.tables] == [("resident", 0.0, 0.0)]


def test_a_million_tokens_cost_the_hours_they_take() -> None:
    prices = Prices(watts=100.0, electricity=0.25, hour=0.975)  # together 1 an hour
    assert prices.per_million(1000.0) == pytest.approx(1_000_000 / 1000 / 3600)


def test_prices_need_each_other() -> None:
    with pytest.raises(RequestError, match="--watts and --electricity say what power costs together"):
        Prices(electricity=0.3)


def test_every_kind_of_disk_says_where_its_figures_come_from() -> None:
    assert DISKS.keys() == SOURCES.keys()
    assert [facts.reads_per_s for facts in DISKS.values()] == sorted(
        (facts.reads_per_s for facts in DISKS.values()), reverse=True
    )


def test_a_site_whose_number_is_no_layers_is_read_at_the_input() -> None:
    assert layers_before("layer_3", 12) == 0.25
    assert layers_before("layer_" + "9" * 5000, 12) == 0.0  # int() refuses so many digits
