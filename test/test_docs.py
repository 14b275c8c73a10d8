"""What the documents show to type works as shown."""

import re
from dataclasses import fields
from pathlib import Path

from dit_policy_training import cli
from dit_policy_training.conversion.layout import Layout
from dit_policy_training.conversion.options import ConvertConfig, DepthCamera, Source
from dit_policy_training.data.sources import DatasetSource
from dit_policy_training.loop.options import TrainConfig
from dit_policy_training.option_table import markdown_table

from dit_policy_ros.embodiment import Embodiment
from dit_policy_ros.policy.configuration import ObjectiveConfig, TextConfig, VisionConfig

ROOT = Path(__file__).parent.parent


def test_the_policy_documents_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/policy.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["actions"].shape == (1, 16, 7)
    assert "transformer in use: the actions differ by" in capsys.readouterr().out


def test_what_the_documents_point_at_is_there():
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
        missing = [link for link in links if not (document.parent / link).exists()]
        assert not missing, f"{document.name} points at {missing}"
        assert links or document.name not in ("README.md", "policy.md")


def test_every_target_a_document_names_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        named = set(re.findall(r"(?:`|&& |^)make ([a-z-]+)", document.read_text(), re.MULTILINE))
        assert named <= targets, f"{document.name} names {named - targets}"


def test_the_converters_document_lists_its_options_as_they_are():
    document = (ROOT / "docs/convert.md").read_text()
    for table in (markdown_table(ConvertConfig, "--"), markdown_table(Source), markdown_table(DepthCamera)):
        assert table in document, f"paste markdown_table() of option_table.py into docs/convert.md:\n{table}"


def test_the_converters_documents_example_of_vectors_is_taken(tmp_path):
    (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/convert.md").read_text(), re.DOTALL)
    (tmp_path / "vectors.yaml").write_text(example)
    given = ["--bags=b", "--embodiment=e.yaml", "--output=o", f"--config={tmp_path / 'vectors.yaml'}"]
    layout = Layout.of(cli.parse(ConvertConfig, given), Embodiment.load(ROOT / "config/embodiments/sim_arm.yaml"))
    assert {"panda_joint1.velocity", "tcp_pose.orientation.w", "gripper"} <= set(layout.state_names)
    assert list(layout.depth) == ["observation.images.wrist_depth"]


def test_the_converters_document_explains_every_warning_of_a_report():
    document = (ROOT / "docs/convert.md").read_text()
    source = (ROOT / "training/dit_policy_training/conversion/report_warnings.py").read_text()
    kinds = set(re.findall(r'Caution\(\s*"([a-z ]+)"', source)) | set(
        re.findall(r'^\s{8}"([a-z ]+)",$', source, re.MULTILINE)
    )
    kinds |= set(re.findall(r'\("([a-z]+ camera)"', source))
    assert len(kinds) > 20
    rows = re.findall(r"^\| ([a-z, ]+) \| ", document, re.MULTILINE)
    told = {kind for row in rows for kind in (row, *row.split(", "), *(f"{part} camera" for part in row.split(", ")))}
    assert kinds <= told, f"docs/convert.md says nothing of {sorted(kinds - told)}"


def test_the_trainings_document_lists_its_options_as_they_are():
    document = (ROOT / "docs/train.md").read_text()
    tables = [markdown_table(TrainConfig, "--"), markdown_table(DatasetSource)]
    for group, name in (
        (VisionConfig, "observation_encoder.vision"),
        (TextConfig, "observation_encoder.text"),
        (ObjectiveConfig, "objective"),
    ):
        kinds = [group.get_choice_class(choice) for choice in group.get_known_choices()]
        tables += [markdown_table(kind, f"--policy.{name}.") for kind in kinds if fields(kind)]
    for table in tables:
        assert table in document, f"paste markdown_table() of option_table.py into docs/train.md:\n{table}"


def test_the_trainings_document_says_what_to_do_about_every_finding():
    document = (ROOT / "docs/train.md").read_text()
    source = (ROOT / "training/dit_policy_training/judging/findings.py").read_text()
    kinds = re.findall(r'Finding\(\s*"([a-z_]+)"', source)
    assert len(kinds) > 12
    assert not [kind for kind in kinds if f"`{kind}`" not in document]
