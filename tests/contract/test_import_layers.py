"""The architecture, enforced: who may import whom. Read from the sources, so nothing heavy is imported to check it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_demix"

# Lower rooms know nothing of higher ones.
LAYERS = [
    {"errors", "units", "mixture", "native", "progress", "process", "locks", "exits", "terminal", "csv_table", "yaml_file"}
    | {"settings", "__init__"},
    {"artifact", "study"},
    {"indexed", "checkpoint"},
    {"data", "train", "merge", "evaluate", "search", "report", "huggingface"},
    {"pipeline"},
    {"launch"},
    {"printing"},
    {"commands"},
    {"cli", "tools"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
FOUNDATION = 0  # The rooms of the lowest layer may use one another.
# Stages exchange artifacts. The evaluator alone builds the trainer's model and takes the merge's live proxy.
BETWEEN_STAGES = {
    "evaluate": (
        "megatron_demix.train.model",
        "megatron_demix.train.compat",
        "megatron_demix.train.weights",
        "megatron_demix.merge.proxies.ProxyMerger",
    )
}
MEGATRON_ROOMS = {"train", "evaluate", "data"}
TORCH_FREE_ROOMS = {"search", "report", "indexed", "mixture"}
OPTIONAL = ["transformer_engine", "apex", "lm_eval", "datatrove", "wandb"]
SLOW = {"torch", "megatron", "numpy", "scipy", "sklearn", "lightgbm", "matplotlib", "pydantic", "yaml", "rich", "tokenizers"}


@dataclass(frozen=True)
class Import:
    """One imported name. at_import: it happens when the module itself is imported, not inside a function."""

    file: Path
    line: int
    room: str
    name: str
    at_import: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"

    @property
    def target_room(self) -> str | None:
        """The room of this package that is imported, or None for another package."""
        parts = self.name.split(".")
        if parts[0] != PACKAGE:
            return None
        return parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


def _sources() -> list[tuple[Path, str]]:
    package = [(p, p.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")) for p in (ROOT / PACKAGE).rglob("*.py")]
    return sorted(package) + [(p, "tools") for p in sorted((ROOT / "tools").glob("*.py"))]


def _imports(file: Path, room: str) -> Iterator[Import]:
    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(file, child.lineno, room, alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: a relative import; write the whole name"
                names = (f"{child.module}.{alias.name}" for alias in child.names)
                yield from (Import(file, child.lineno, room, name, at_import) for name in names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from visit(child, False)
            else:
                inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from visit(child, at_import and not inner)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), True)


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [i for file, room in _sources() for i in _imports(file, room)]


def _none(offenders: list[Import], rule: str) -> None:
    assert not offenders, f"{rule}:\n" + "\n".join(map(str, offenders))


def test_every_room_has_a_layer() -> None:
    unknown = {room for _, room in _sources()} - set(RANK)
    assert not unknown, f"{sorted(unknown)}: not in ARCHITECTURE's list of rooms; give each a layer in this test"


def test_imports_go_downward(imports: list[Import]) -> None:
    def upward(i: Import) -> bool:
        if i.target_room is None or i.target_room == i.room:
            return False
        if any(f"{i.name}.".startswith(f"{allowed}.") for allowed in BETWEEN_STAGES.get(i.room, ())):
            return False
        source, target = RANK[i.room], RANK[i.target_room]
        return target >= source and not source == target == FOUNDATION

    _none([i for i in imports if upward(i)], "only lower rooms may be imported, and stages do not import one another")


def test_megatron_core_stays_in_its_rooms(imports: list[Import]) -> None:
    offenders = [i for i in imports if i.name.split(".")[0] == "megatron" and i.room not in MEGATRON_ROOMS]
    _none(offenders, f"megatron.core is imported only in {sorted(MEGATRON_ROOMS)}")


def test_torch_stays_out_of_search_report_and_formats(imports: list[Import]) -> None:
    offenders = [i for i in imports if i.name.split(".")[0] == "torch" and i.room in TORCH_FREE_ROOMS]
    _none(offenders, f"torch is never imported in {sorted(TORCH_FREE_ROOMS)}")


def test_one_door_to_the_compiled_core(imports: list[Import]) -> None:
    offenders = [i for i in imports if f"{i.name}.".startswith(f"{PACKAGE}._core.") and i.room != "native"]
    _none(offenders, "the compiled core is imported by native/ alone")


def test_tools_are_thin(imports: list[Import]) -> None:
    offenders = [
        i
        for i in imports
        if i.room == "tools" and i.name.split(".")[0] not in {PACKAGE, "__future__", *sys.stdlib_module_names}
    ]
    _none(offenders, "a tool parses arguments and calls the package, nothing else")


@pytest.mark.parametrize("optional", OPTIONAL)
def test_an_optional_package_is_probed_in_one_place(imports: list[Import], optional: str) -> None:
    files = {i.file for i in imports if i.name.split(".")[0] == optional}
    assert len(files) <= 1, f"{optional} is imported in {sorted(str(f.relative_to(ROOT)) for f in files)}, expected one place"


def test_commands_import_nothing_slow_at_the_top(imports: list[Import]) -> None:
    offenders = [i for i in imports if i.room in ("cli", "tools") and i.at_import and i.name.split(".")[0] in SLOW]
    _none(offenders, "so that --help is instant, heavy packages are imported inside functions")


def test_importing_does_nothing_else() -> None:
    """No module configures logging, seeds, devices or the environment when it is imported: it holds no bare call."""
    offenders = []
    for file, _ in _sources():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            environment = isinstance(node, ast.Assign) and any("environ" in ast.unparse(t) for t in node.targets)
            if call or environment:
                offenders.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not offenders, "a module does something when it is imported:\n" + "\n".join(offenders)


@pytest.mark.parametrize(
    ("rooms", "forbidden"),
    [(["cli"], SLOW), (sorted(TORCH_FREE_ROOMS), {"torch", "megatron"})],
    ids=["cli", "torch-free rooms"],
)
def test_what_really_gets_loaded(rooms: list[str], forbidden: set[str]) -> None:
    """The same in a fresh interpreter, which also sees what imported modules import in turn."""
    files = [file for file, room in _sources() if room in rooms]
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files]
    script = f"import sys; {'; '.join(f'import {m}' for m in modules)}; print(*sorted({forbidden!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
