import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spectitan.config.sections import Optimizer
from spectitan.distributed.fsdp import shard_trained
from spectitan.distributed.mesh import init_distributed
from spectitan.distributed.utils import backward, clip_grad_norm
from spectitan.errors import UserError
from spectitan.training.checkpoint import Checkpointer, module_tensors, saves_beside_training
from spectitan.training.checkpoint_reading import find_checkpoint, read_state, read_tensors
from spectitan.training.identity import check_identity, warn_of_other_text
from spectitan.training.optimizer import build_optimizer, optimizer_tensors, step_if_finite
from spectitan.training.restricted_metadata import RestrictedReader
from spectitan.training.run_folder import move_aside

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mesh():
    world = init_distributed("none", device="cpu")
    yield world.mesh
    world.close()


class Toy(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm, self.head = nn.Embedding(13, 6), nn.LayerNorm(6), nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept_ids", torch.arange(5) + seed)
        self.register_buffer("cosines", torch.rand(3), persistent=False)

    def forward(self, tokens):
        return (self.head(self.norm(self.embed(tokens))) ** 2).sum()


class Run:
    """A sharded model with a tied pair, an optimizer, and the step it is at."""

    def __init__(self, mesh, seed=0):
        self.model, self.step = Toy(seed), 0
        shard_trained(self.model, [], mesh, torch.float32)
        self.optimizer = build_optimizer(self.model, Optimizer())

    def tensors(self):
        return {f"model.{name}": tensor for name, tensor in module_tensors(self.model).items()} | {
            f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()
        }

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            backward(self.model(torch.tensor([self.step % 13, 5, 12])))
            step_if_finite(self.optimizer, 10, clip_grad_norm(self.model.parameters(), 1.0))
            self.step += 1


def whole(tensors):
    return {name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone() for name, tensor in tensors.items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def numbers(folder):
    return sorted(int(path.name[5:]) for path in Path(folder).glob("step-*"))


TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(7)}


def empty():
    return {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}


@pytest.fixture
def three(tmp_path):
    """A checkpointer with steps 1, 2, 3, and a fresh one that has verified nothing."""
    for step in (1, 2, 3):
        tensors = {name: tensor * step for name, tensor in TENSORS.items()}
        Checkpointer(tmp_path / "checkpoints").save(step, tensors, {"position": 10 * step})
    return Checkpointer(tmp_path / "checkpoints")


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(mesh, tmp_path):
    straight = Run(mesh)
    straight.train(5)
    interrupted = Run(mesh)
    interrupted.train(3)
    state = {"position": 24, "identity": {"data.weights": [0.25, 0.75]}}
    path = Checkpointer(tmp_path).save(3, interrupted.tensors(), state)
    resumed = Run(mesh, seed=1)
    assert Checkpointer(tmp_path).load(path, resumed.tensors()) == {"step": 3, **state}
    assert_equal(whole(resumed.tensors()), whole(interrupted.tensors()))
    resumed.step = 3
    resumed.train(2)
    assert_equal(whole(resumed.tensors()), whole(straight.tensors()))


def test_before_the_first_step_there_is_a_whole_checkpoint_too(mesh, tmp_path):
    run = Run(mesh)
    path = Checkpointer(tmp_path).save(0, run.tensors(), {})
    other = Run(mesh, seed=1)
    Checkpointer(tmp_path).load(path, other.tensors())
    assert_equal(whole(run.tensors()), whole(other.tensors()))
    assert whole(run.tensors())["optimizer.embed.weight.step"] == 0  # no dummy step was taken


def test_module_tensors_has_tied_weights_once_and_no_passing_buffers(mesh):
    assert sorted(module_tensors(Run(mesh).model)) == ["embed.weight", "kept_ids", "norm.bias", "norm.weight"]


def test_tensors_are_read_without_a_process_group(mesh, tmp_path):
    run = Run(mesh)
    Checkpointer(tmp_path / "run" / "checkpoints").save(7, run.tensors(), {"position": 1})
    expected = whole(module_tensors(run.model))
    torch.save(expected, tmp_path / "expected.pt")
    script = f"""
import torch, torch.distributed as dist, warnings
warnings.simplefilter("error")
from spectitan.training.checkpoint_reading import find_checkpoint, read_state, read_tensors
path = find_checkpoint({str(tmp_path / "run")!r})
tensors, expected = read_tensors(path, "model."), torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)
assert read_state(path) == {{"step": 7, "position": 1}} and read_tensors(path, "nothing.") == {{}} and not dist.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_floating_point_dtype_may_differ(tmp_path):
    path = Checkpointer(tmp_path).save(1, TENSORS, {})
    target = {"a": torch.zeros(3, 4, dtype=torch.float64), "b": torch.tensor(0)}
    Checkpointer(tmp_path).load(path, target)
    assert torch.equal(target["a"], TENSORS["a"].double())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda target: target.pop("a"), "has tensors that this model lacks: a"),
        (lambda target: target.update(c=torch.zeros(2)), "lacks tensors of this model: c"),
        (lambda target: target.update(a=torch.zeros(4, 3)), r"a has shape \[3, 4\], this model's is \[4, 3\]"),
        (lambda target: target.update(b=torch.tensor(0.0)), "b is torch.int64, this model's is torch.float32"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(three, change, message):
    target = empty()
    change(target)
    with pytest.raises(UserError, match=message):
        three.load(three.newest_valid(), target)
    assert all(tensor.count_nonzero() == 0 for tensor in target.values())


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ("__0_0.distcp", ".metadata", "state.json", "manifest.json")
DAMAGES = (truncate, flip_a_byte, Path.unlink, lambda path: path.write_bytes(b""))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(three, caplog, name, damage):
    newest = three.folder / "step-00000003"
    damage(newest / name)
    path = three.newest_valid()
    assert path.name == "step-00000002" and "step-00000003 is broken" in caplog.text
    target = empty()
    assert three.load(path, target) == {"step": 2, "position": 20}
    assert torch.equal(target["a"], TENSORS["a"] * 2)
    with pytest.raises(UserError):
        three.load(newest, empty())
    assert find_checkpoint(three.folder).name == "step-00000002"


def test_all_broken_is_an_error_and_none_is_none(three, tmp_path):
    assert Checkpointer(tmp_path / "nowhere").newest_valid() is None
    for folder in three.folder.iterdir():
        truncate(folder / "__0_0.distcp")
    with pytest.raises(UserError, match="all 3 checkpoints are broken"):
        three.newest_valid()
    with pytest.raises(UserError, match="all 3 checkpoints are broken"):
        find_checkpoint(tmp_path)


def test_find_checkpoint_takes_what_a_user_names(three, tmp_path):
    newest = three.folder / "step-00000003"
    assert find_checkpoint(tmp_path) == find_checkpoint(three.folder) == find_checkpoint(newest) == newest
    for nothing in (tmp_path / "nowhere", newest / "state.json"):
        with pytest.raises(UserError, match="no checkpoint here"):
            find_checkpoint(nothing)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rewrite_metadata(folder, change):
    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(change(metadata) or metadata, file)


def test_metadata_that_would_run_code_is_refused(three, tmp_path):
    folder = three.newest_valid()
    for change in (
        lambda metadata: Evil(tmp_path / "ran"),
        lambda metadata: setattr(metadata, "planner_data", Evil(tmp_path / "ran")),
        lambda metadata: metadata.state_dict_metadata.update(z=Evil(tmp_path / "ran")),
    ):
        rewrite_metadata(folder, change)
        with pytest.raises(UserError, match=r"\.metadata: .*system is no part of a description"):
            read_tensors(folder)
        Checkpointer(three.folder).save(3, TENSORS, {})
    assert not (tmp_path / "ran").exists()


def absurd_size(metadata):
    metadata.state_dict_metadata["a"].size = torch.Size((2**40, 2**20))
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size((2**40, 2**20))


def other_folder(metadata):
    next(iter(metadata.storage_data.values())).relative_path = "../step-00000002/__0_0.distcp"


def past_the_end(metadata):
    next(iter(metadata.storage_data.values())).length = 10**12


def byte_entry(metadata):
    metadata.state_dict_metadata["a"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()


def half_the_parts(metadata):
    metadata.state_dict_metadata["a"].chunks[0].sizes = torch.Size((1, 4))


@pytest.mark.parametrize("change", [absurd_size, other_folder, past_the_end, byte_entry, half_the_parts, lambda metadata: [1, 2]])
def test_absurd_metadata_is_refused_before_anything_is_allocated(three, change):
    folder = three.newest_valid()
    rewrite_metadata(folder, change)
    with pytest.raises(UserError, match=r"\.metadata: not the metadata of a checkpoint of tensors"):
        RestrictedReader(folder).read_metadata()


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"(" * 100000])
def test_metadata_that_is_no_pickle_is_refused(three, content):
    folder = three.newest_valid()
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata"):
        read_tensors(folder)


def test_pruning_keeps_the_newest_whole_ones(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep_latest_k=2)
    for step in (1, 2, 3, 4):
        checkpointer.save(step, TENSORS, {})
    assert numbers(tmp_path) == [3, 4]
    truncate(tmp_path / "step-00000004" / "__0_0.distcp")
    checkpointer.save(5, TENSORS, {})  # the broken one does not count
    assert numbers(tmp_path) == [3, 4, 5]
    checkpointer.save(6, TENSORS, {})
    assert numbers(tmp_path) == [5, 6]


def test_a_repeated_step_replaces_the_broken_checkpoint_and_later_ones_are_left_alone(three):
    truncate(three.folder / "step-00000002" / "__0_0.distcp")
    truncate(three.folder / "step-00000003" / "__0_0.distcp")
    checkpointer = Checkpointer(three.folder, keep_latest_k=1)
    assert checkpointer.newest_valid().name == "step-00000001"
    checkpointer.save(2, TENSORS, {"again": True})
    assert numbers(three.folder) == [2, 3]
    assert read_state(checkpointer.newest_valid()) == {"step": 2, "again": True}


def test_what_an_interrupted_save_left_is_cleaned_up(three):
    (three.folder / ".saving-step-00000004").mkdir()
    (three.folder / "step-00000003").rename(three.folder / ".replaced-step-00000003")  # killed between the two renames
    assert Checkpointer(three.folder).newest_valid().name == "step-00000003"
    assert sorted(path.name for path in three.folder.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]


@pytest.mark.parametrize("limit", [1, 5000, 100_000])
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoints(three, limit):
    """The system's limit on the size of a file fails writes at any byte, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="step-00000004: checkpoint not saved, earlier ones are unchanged: .*File too large") as error:
            three.save(4, {"large": torch.zeros(50_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in three.folder.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]
    assert three.newest_valid().name == "step-00000003"


def test_too_little_space_is_said_before_writing(three, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="no space left on device"):
        three.save(4, TENSORS, {})
    assert numbers(three.folder) == [1, 2, 3]


@pytest.mark.parametrize("way", ["save", "begin"])
def test_kill_9_while_saving_leaves_the_earlier_checkpoints_valid(tmp_path, way):
    script = f"""
import torch
from spectitan.training.checkpoint import Checkpointer
checkpointer, step = Checkpointer({str(tmp_path)!r}, keep_latest_k=2), 0
while True:
    step += 1
    checkpointer.{way}(step, {{f"t{{i}}": torch.full((50_000,), float(step)) for i in range(20)}}, {{"value": step}})
    checkpointer.finish()
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    saved = [int(process.stdout.readline()) for _ in range(3)][-1]
    while not list(tmp_path.glob(".saving-*/__0_0.distcp")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    saved = max([saved, *map(int, process.stdout.read().split())])
    process.wait()
    path = Checkpointer(tmp_path).newest_valid()
    step = read_state(path)["step"]
    assert step in (saved, saved + 1)  # the rename may have been done just before the kill
    tensors = read_tensors(path)
    assert len(tensors) == 20 and all((tensor == step).all() for tensor in tensors.values())
    assert not list(tmp_path.glob(".saving-*"))


def test_move_aside_never_overwrites(tmp_path):
    assert move_aside(tmp_path / "run") is None
    for number in (1, 2, 3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "content").write_text(str(number))
        assert move_aside(tmp_path / "run") == tmp_path / f"run.{number}"
    assert [(tmp_path / f"run.{number}" / "content").read_text() for number in (1, 2, 3)] == ["1", "2", "3"]


def test_identity_names_the_key_and_logs_the_rest(caplog):
    saved = {"data.weights": [0.5, 0.5], "speculator.width": 4, "optimizer.lr": 1e-3, "eval.interval": 5}
    with caplog.at_level("INFO"):
        check_identity(saved, saved | {"data.weights": (0.5, 0.5), "optimizer.lr": 2e-3})
    assert "optimizer.lr: 0.001 -> 0.002" in caplog.text and "data" not in caplog.text
    with pytest.raises(UserError, match=r"speculator.width was 4 in the checkpoint and is 8 now"):
        check_identity(saved, saved | {"speculator.width": 8})
    with pytest.raises(UserError, match=r"data.weights was \[0.5, 0.5\] in the checkpoint and is absent now"):
        check_identity(saved, {key: value for key, value in saved.items() if key != "data.weights"})
    with pytest.raises(
        UserError, match=r"^the draft vocabulary \(speculator.draft_vocab_size, token_freq_path, .* was 'a' in the checkpoint"
    ):
        check_identity(saved | {"speculator.d2t": "a"}, saved | {"speculator.d2t": "b"})


def test_another_packing_is_another_run():
    saved = {"data.packing": "best_fit", "data.overlong": "split"}
    check_identity(saved, dict(saved))
    for key, value in (("data.packing", "document"), ("data.overlong", "truncate")):
        with pytest.raises(UserError, match=f"^{key} was '{saved[key]}' in the checkpoint and is '{value}' now: set it back"):
            check_identity(saved, saved | {key: value})
    with pytest.raises(UserError, match="^data.packing was 'concat' in the checkpoint"):  # written before there was the key
        check_identity({}, saved)
    check_identity({}, {"data.packing": "concat", "data.overlong": "split"})


def test_identity_of_a_second_stage(caplog):
    """Its keys must match between runs that both have one; when it begins may change, from never and to never too."""
    never, early, late = ({"stage2.start_step": start, "stage2.top_k": 10} for start in (-1, 0, 700))
    with caplog.at_level("INFO"):
        for saved, current in ((never, late), (late, never), (early, late)):
            check_identity(saved, current | ({} if saved is early else {"stage2.top_k": 5}))
        check_identity({}, late)  # written before there was a second stage
    assert "stage2.start_step: 0 -> 700" in caplog.text
    with pytest.raises(UserError, match="stage2.top_k was 10 in the checkpoint and is 5 now"):
        check_identity(early, late | {"stage2.top_k": 5})


def test_other_text_is_said_and_allowed(caplog):
    warn_of_other_text({"a": "1", "b": "2"}, {"a": "1", "b": "2"})
    warn_of_other_text({}, {"a": "1"})  # a checkpoint that does not say
    assert caplog.text == ""
    warn_of_other_text({"a": "1", "b": "2"}, {"a": "1", "b": "3"})
    assert "the text of b, or how it is packed, is not what it was" in caplog.text


def test_state_json_that_is_no_json_is_one_line(three):
    (three.folder / "step-00000003" / "state.json").write_text("{" + json.dumps([1])[:-1])
    with pytest.raises(UserError, match="state.json: not JSON"):
        read_state(three.folder / "step-00000003")


# ---- written beside training ----


def test_what_is_written_in_the_background_is_what_there_was_at_its_beginning(mesh, tmp_path):
    run = Run(mesh)
    run.train(2)
    Checkpointer(tmp_path / "waited").save(2, run.tensors(), {"position": 5})
    checkpointer = Checkpointer(tmp_path / "background")
    for step in (2, 4):
        before = whole(run.tensors())
        checkpointer.begin(step, run.tensors(), {"position": 5})
        run.train(2)
        assert checkpointer.under_way and not list((tmp_path / "background").glob(f"step-*{step}"))
        path = checkpointer.finish()
        assert path.name == f"step-{step:08d}" and not checkpointer.under_way and checkpointer.finish() is None
        assert_equal(read_tensors(path), before)
    manifests = [json.loads((tmp_path / way / "step-00000002" / "manifest.json").read_text()) for way in ("waited", "background")]
    assert manifests[0]["files"]["__0_0.distcp"] == manifests[1]["files"]["__0_0.distcp"]
    copies = checkpointer._buffers.values()
    assert sum(copy.nbytes for copy in copies) == sum(tensor.nbytes for tensor in before.values())  # one copy, of all checkpoints


def test_a_failure_in_the_background_is_raised_at_the_end_and_the_next_one_is_whole(three, monkeypatch):
    monkeypatch.setattr("spectitan.training.checkpoint_writing.describe", lambda path: os.stat(path / "nowhere"))
    three.begin(4, TENSORS, {})
    with pytest.raises(OSError, match="step-00000004: checkpoint not saved, earlier ones are unchanged: .*Not a directory") as error:
        three.finish()
    assert "\n" not in str(error.value) and numbers(three.folder) == [1, 2, 3] and not list(three.folder.glob(".*"))
    monkeypatch.undo()
    three.begin(5, TENSORS, {})
    assert three.finish() == three.newest_valid() == three.folder / "step-00000005"


@pytest.mark.parametrize("mode, device, beside", [
    ("auto", "cuda", True), ("auto", "cpu", False), ("async", "cpu", True), ("disabled", "cuda", False),
])  # fmt: skip
def test_where_checkpoints_are_written_beside_training(mode, device, beside):
    assert saves_beside_training(mode, torch.device(device)) is beside
