"""A config as people write it: texts as typed, numbers one way, keys once, errors in words."""

import json
from pathlib import Path

import pytest
import yaml

from blocksearch.strategies import STRATEGIES
from configs import FOLDER, read_config
from configs.experiment import Config, config_keys
from configs.keys import Value, find, names_of
from evaluation.errors import InputError
from evaluation.files.bounded import Written, parse_yaml
from fuzzing import quickstart
from mutations import changed

CONFIG = quickstart()
TEXT = (FOLDER / "quickstart.yaml").read_text()
END = TEXT.count("\n")  # lines
STRATEGY = [f"blocksearch.strategies.{name}" for name in STRATEGIES]
GRADIENT = "blocksearch.strategies.enhanced_gradient"


def batched(items, size):
    return [items[first : first + size] for first in range(0, len(items), size)]


def load(*changes):
    return Config.load(FOLDER / "quickstart.yaml", changes)


def refusal(*changes):
    with pytest.raises(InputError) as raised:
        load(*changes)
    return str(raised.value)


def from_file(tmp_path, content, *changes):
    path = tmp_path / "own.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Config.load(path, changes)


def refusal_of(tmp_path, content):
    with pytest.raises(InputError) as raised:
        from_file(tmp_path, content)
    return str(raised.value)


def there(text):
    """The path that a config holds, which is as good in every folder."""
    return str(Path(text).expanduser().absolute())


def with_line(old, new):
    assert TEXT.count(old) >= 1
    return TEXT.replace(old, new, 1)


# --- texts ------------------------------------------------------------------------------------

TYPED = [
    *("data/set #1", "2024", "no", "2024-01-01", "2024-13-45", "1e5", "010", "1:30", ".inf"),
    *("/data/a: b", "[x]", "{x: 1}", "'quoted'", '"quoted"', "trailing ", " leading", "a=b"),
    *("~", "~/pictures", "@x", "- x", "&x", "*x", "!x", "# x", "C:\\x", "a, b", "true", "null "),
]


@pytest.mark.parametrize("text", TYPED)
def test_a_text_given_by_set_is_taken_exactly_as_it_was_typed(text):
    assert load(f"data.root={text}").data.root == there(text)


@pytest.mark.parametrize("key", ["data.root", "netsearch.latency", "workers.address"])
def test_every_free_text_of_a_config_is_known_as_one(key):
    assert find(config_keys(), key) == Value("text")


@pytest.mark.parametrize("text", ["null", ""])
def test_null_and_nothing_are_no_text(text):
    assert load("data.root=x", f"data.root={text}").data.root is None


@pytest.mark.parametrize("text", ["2024", "no", "2024-01-01", "2024-13-45", "1_000", "010", "1.50"])
def test_a_text_of_a_file_that_yaml_takes_for_something_else_is_taken_as_written(text, tmp_path):
    config = from_file(tmp_path, with_line("root: null", f"root: {text}"))
    assert config.data.root == there(text)


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_no_text_in_a_file_stays_none(text, tmp_path):
    assert from_file(tmp_path, with_line("root: null", f"root: {text}")).data.root is None


def test_texts_within_tables_lists_and_choices_are_taken_as_written_too():
    assert load("data={name: digits, root: 2024}").data.root == there("2024")
    assert "got 'no'" in refusal("data.color=no")
    assert "got 'no'" in refusal("netsearch.costs=[no]")
    assert "unknown '1'; there are" in refusal("blocksearch.ops=[1]")
    assert "got 'no'" in refusal(f"{GRADIENT}.alpha_optimizer=no")
    assert load('netsearch.search="random"', "data.color= grey ").data.color == "grey"


def test_what_is_no_text_stays_what_yaml_makes_of_it(tmp_path):
    assert load("data.download=yes").data.download is True
    assert load(f"{GRADIENT}.one_hot=off").blocksearch.strategies["enhanced_gradient"] == {
        **CONFIG["blocksearch"]["strategies"]["enhanced_gradient"],
        "one_hot": False,
    }
    found = parse_yaml("a: [no, 1, x, null]", written=True)
    assert found == {"a": [Written(False, "no"), Written(1, "1"), "x", None]}


# --- numbers ----------------------------------------------------------------------------------

WHOLE = {
    "300k": 300_000, "20M": 20_000_000, "1.5G": 1_500_000_000, "1.5k": 1500, "1e5": 100_000,
    "10,000": 10_000, "1,234,567": 1_234_567, "10_000": 10_000, "12.0": 12, "'300k'": 300_000,
}  # fmt: skip


@pytest.mark.parametrize("text", WHOLE)
def test_a_whole_number_may_be_written_as_in_options_and_in_output(text, tmp_path):
    assert load(f"netsearch.max_params={text}").netsearch.max_params == WHOLE[text]
    written = with_line("max_params: null", f"max_params: {text}")
    found = from_file(tmp_path, written).netsearch.max_params
    assert (found, type(found)) == (WHOLE[text], int)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1,000.5", 1000.5),
        (".5", 0.5),
        ("2", 2.0),
        ("1k", 1000.0),
        ("1_0.5", 10.5),
    ],
)
def test_a_fraction_may_be_written_in_every_way(text, value, tmp_path):
    assert load(f"retrain.train.learning_rate={text}").retrain.train.learning_rate == value
    written = TEXT.replace("learning_rate: 0.1 ", f"learning_rate: {text} ")
    assert from_file(tmp_path, written).retrain.train.learning_rate == value


def test_numbers_in_lists_and_of_strategies_are_read_alike():
    assert load("netsearch.widths=[8, 1.6e1, 1_000, 2k]").netsearch.widths == (8, 16, 1000, 2000)
    config = load(f"{GRADIENT}.gamma=[1e-1, 1, 0.5]", "blocksearch.seeds=[0, 1e1]")
    assert config.blocksearch.strategies["enhanced_gradient"]["gamma"] == [0.1, 1, 0.5]
    labels = [search.name for search in config.blocksearch.searches(0)][::4]
    assert labels == [  # an integer stays one: names of old searches do not change
        f"enhanced_gradient-gamma={gamma}-complexity_weight=0.0-s0" for gamma in ("0.1", "1", "0.5")
    ]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        *((text, "commas stand") for text in ("1,2", "1,5", "0,125", "10,00", "1,0000", "1,,000")),
        *((text, "no zero before") for text in ("010", "-01")),
        *((text, "") for text in ("1.5", "1e-3", "true", "0x10", "1:30", ".inf", "nan", "300kk")),
        *((text, "") for text in ("many", "1 000", "1e400", "1__0", "[5]", "2024-01-01")),
        ("20%", "0.2"),
    ],
)
def test_what_is_no_whole_number_is_refused_as_it_was_typed(text, hint):
    message = refusal(f"netsearch.max_params={text}")
    assert "netsearch.max_params: expected a whole number such as 20, 300k or 10,000" in message
    assert f"got {text}" in message and hint in message


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan", "nan", "inf", "0,1", "fast", "yes"])
def test_what_is_no_finite_number_is_refused(text):
    key = "retrain.train.learning_rate"
    assert f"{key}: expected a number such as 0.5, 1e-3 or 1,000, got {text}" in refusal(
        f"{key}={text}"
    )


def test_a_comma_within_a_list_parts_values_and_that_is_said():
    assert "netsearch.widths: expected a list such as [8, 16], got 8,16" in refusal(
        "netsearch.widths=8,16"
    )
    assert "got 000 (a number has no zero before its other digits)" in refusal(
        "netsearch.widths=[1,000]"
    )


# --- keys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{TEXT}\ndata:\n  name: npz\n", f"`data` is given twice, in lines 18 and {END + 2}"),
        (with_line("  color:", "  name: npz\n  color:"), "`data.name` is given twice, in lines 19"),
        (
            f"{TEXT}\nseed: 1\nseed: 2\n",
            f"`seed` is given 3 times, in lines 6, {END + 2} and {END + 3}",
        ),
        (
            f'{TEXT}\n"seed": 1\ndata: {{}}\n',
            f"`seed` .* 6 and {END + 2}; `data` .* 18 and {END + 3}",
        ),
        (f"x: [{{a: 1, a: 2}}]\n{TEXT}", "`x.a` is given twice$"),
    ],
    ids=["table", "inner", "thrice", "both", "in a list"],
)
def test_a_key_that_is_given_twice_is_refused_with_its_lines(text, words, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"own\.yaml: {words}"):
        Config.load(path)


def test_a_key_may_stand_in_two_tables_and_beside_a_merged_one(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("a: &a {x: 1}\nb: {<<: *a, x: 2}\n")
    assert read_config(path) == {"a": {"x": 1}, "b": {"x": 2}}
    assert "--set data={a: 1, a: 2}: `a` is given twice" in refusal("data={a: 1, a: 2}")


def test_a_table_that_an_alias_repeats_is_changed_alone(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("a: &a {x: 1}\nb: *a\n")
    assert read_config(path, ["b.x=2"]) == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("data.rot", "data.root"),
        ("data.colour", "data.color"),
        ("data.max-train-images", "data.max_train_images"),
        ("blocksearch.epoch", "blocksearch.epochs"),
        ("netsearch.epochs", "netsearch.train.epochs or netsearch.shared_weights.epochs"),
        ("blocksearch.gamma", f"{GRADIENT}.gamma"),
        ("blocksearch.strategies.darts.gamma", f"{GRADIENT}.gamma"),
        ("train", "retrain, retrain.train or netsearch.train"),
        ("retrain.max_params", "netsearch.max_params"),
        ("Seed", "seed"),
    ],
)
def test_for_an_unknown_key_the_nearest_is_proposed(wrong, meant):
    assert f": {wrong}: there is no such key (did you mean {meant}" in refusal(f"{wrong}={{}}")


def test_every_key_is_proposed_for_itself_with_a_letter_too_many():
    keys = [key for key in names_of(config_keys()) if key not in STRATEGY]
    own = [key for key in keys if key.startswith("blocksearch.strategies.")]  # are read last
    others = [key for key in keys if key not in own]
    assert len(own) > 50 and len(others) > 50
    for some in (*batched(own, 10), *batched(others, 10)):  # a message has room for twenty
        message = refusal(*(f"{key}s=1" for key in some))
        for key in some:
            meant = message.partition(f" {key}s: ")[2].partition("(did you mean ")[2]
            assert key in meant.partition("?)")[0].replace(" or ", ", ").split(", "), message


def test_where_nothing_is_near_the_keys_of_the_table_are_named():
    assert "those of data are name, root, download" in refusal("data.size=3")
    assert "those of a config are seed, workers, data" in refusal("lr=3")
    assert "unknown 'dart' (did you mean darts?); there are darts, dca_nas" in refusal(
        "blocksearch.strategies.dart.pull=1"
    )


@pytest.mark.parametrize("change", ["data..root=1", "=5", ".=1", "data.=1", "seed", "seed: 3"])
def test_a_change_without_a_whole_key_is_refused(change):
    assert refusal(change) == f"--set {change}: expected key=value, such as data.root=pictures"


@pytest.mark.parametrize("change", ["seed = 3", " seed=3", "data. root=x"])
def test_a_change_with_spaces_around_its_key_is_refused(change):
    assert "without spaces around the key" in refusal(change)


def test_of_two_changes_of_a_key_the_last_counts():
    assert load("seed=1", "seed=2").seed == 2


# --- plain words ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("netsearch.widths=8", "netsearch.widths: expected a list such as [8], got 8"),
        ("netsearch.costs=params", "costs: expected a list such as [params], got 'params'"),
        ("netsearch.widths=null", "netsearch.widths: expected a list such as [8, 16], got null"),
        ("retrain.seeds=[]", "retrain.seeds: expected at least 1 value, got []"),
        ("retrain.members=20000", "retrain.members: expected at most 10,000, got 20,000"),
        ("netsearch.depths=[1, 4000]", "netsearch.depths: expected at most 100, got 4,000"),
        ("seed=-1", "seed: expected at least 0, got -1"),
        ("netsearch.mutation=0", "netsearch.mutation: expected more than 0, got 0"),
        ("retrain.train.momentum=1", "retrain.train.momentum: expected less than 1, got 1"),
        ("blocksearch.channels=6", "blocksearch.channels: expected a multiple of 4, got 6"),
        ("data.download=maybe", "data.download: expected true or false, got 'maybe'"),
        ("data.name=folders", "npz, folder or own (did you mean folder?), got 'folders'"),
        ("data.color=blue", "data.color: expected auto, grey or rgb, got 'blue'"),
        ("data=5", "data: expected a table of keys and values, got 5"),
        ("blocksearch.strategies.darts=", "strategies.darts: expected a table of keys and values"),
        ("blocksearch.strategies={}", "blocksearch.strategies: expected at least 1 value"),
        ("blocksearch.strategies={1: {}}", "strategies: expected a name as key, got 1"),
        ("blocksearch.ops=9", "nas_bench_201 or a list such as [9], got '9'"),
        ("data={root: [x]}", "data.root: expected a text, got ['x']"),
        (f"{GRADIENT}.gamma=2", f"{GRADIENT}.gamma: expected at most 1, got 2"),
        ("workers.address=a:1", "workers: expected no address with backend loky"),
        ("netsearch.search=halving", "netsearch.search: halving would train for"),
        ("netsearch.costs=[param]", "(did you mean params?), got 'param'"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(change, words):
    message = refusal(change)
    assert words in message and message.count("expected") <= 1, message


def test_all_problems_are_told_at_once_each_behind_its_key(tmp_path):
    message = refusal("data.rot=x", "seed=-1", "netsearch.train.epochs=many", f"{GRADIENT}.tau=0")
    assert all(key in message for key in ("seed: ", "data.rot: ", "netsearch.train.epochs: "))
    swept = refusal(
        f"{GRADIENT}.gamma=[2, x]", f"{GRADIENT}.taus=1", "blocksearch.strategies.darts.x=1"
    )
    assert all(words in swept for words in ("got 2", "got x", "taus: there", "darts.x: there"))
    many = refusal_of(tmp_path, TEXT + "".join(f"k{number}: 1\n" for number in range(500)))
    assert many.endswith("; and 480 more")


def test_what_is_missing_is_told_by_its_key(tmp_path):
    data = changed(CONFIG, ("netsearch", "train", "epochs"), "remove", None)
    data = changed(data, ("retrain",), "remove", None)
    message = refusal_of(tmp_path, json.dumps(data))
    assert "netsearch.train.epochs: required, and missing; retrain: required, and" in message


def test_the_options_of_compare_are_told_in_the_same_words():
    config = load()
    with pytest.raises(InputError, match=r"blocksearch\.strategies: expected at least 1 value"):
        config.comparing(",", None)
    with pytest.raises(InputError, match=r"unknown 'dart' \(did you mean darts\?\)"):
        config.comparing("dart", None)


# --- files ------------------------------------------------------------------------------------

UMLAUT = f"# Größe\n{TEXT}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (UMLAUT.encode("utf-16"), "it looks like UTF-16 (save it as UTF-8)"),
        (UMLAUT.encode("utf-16-be"), "it looks like UTF-16 (save it as UTF-8)"),
        (TEXT.encode("utf-16-le"), "it looks like UTF-16 (save it as UTF-8)"),
        (TEXT.encode("utf-32"), "it looks like UTF-32 (save it as UTF-8)"),
        (UMLAUT.encode("latin-1"), "(save it as UTF-8): line 1 has 0xf6 at offset 4"),
        (b"seed: 1\n" + "# Größe".encode("cp1252"), "line 2 has 0xf6 at offset 12"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "it looks like no text: line 3 has 0x00 at offset 8"),
        (b"PK\x03\x04\xff\xfe", "it looks like no text: line 1 has 0xff at offset 4"),
        (bytes(50), "it looks like no text: line 1 has 0x00 at offset 0"),
    ],
    ids=["16", "16 be", "16 without mark", "32", "latin", "windows", "picture", "zip", "zeros"],
)
def test_of_a_file_that_is_not_utf_8_the_encoding_is_told_first(content, words, tmp_path):
    message = refusal_of(tmp_path, content)
    assert message.startswith(f"{tmp_path / 'own.yaml'}: expected UTF-8 text; it looks like ")
    assert words in message and "quickstart.yaml" not in message


def test_utf_8_with_a_mark_and_with_letters_beyond_ascii_is_read(tmp_path):
    for text in (UMLAUT.encode("utf-8-sig"), UMLAUT.encode(), TEXT.replace("\n", "\r\n").encode()):
        assert from_file(tmp_path, text) == load()


def test_a_file_that_is_not_there_is_told_with_the_nearest_there_is(tmp_path):
    with pytest.raises(InputError, match=r"got none \(did you mean quickstart\.yaml\?\); there"):
        Config.load(tmp_path / "quickstrat.yml")
    with pytest.raises(InputError, match=rf"got a folder; .* --set data\.root={tmp_path}`"):
        Config.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: digits", "\tname: digits", "line 19, column 3: there is a tab"),
        ("name: digits", "name digits", "expected `key: value`, indented"),
        ("root: null", "root: /data/a: b", "column 16: a second colon; .* quotes"),
        ("root: null", "root: @x", "begins with this character needs quotes"),
        ("[4, 8, 12, 16, 20]", "[4, 8, 12", "expected a comma, or the `]`"),
        ("name: digits", "name: \x07", r"character 1,195 is 0x07"),
    ],
)
def test_what_is_not_yaml_is_told_by_its_line_and_what_to_do(old, new, words, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(with_line(old, new))
    with pytest.raises(InputError, match=f"own.yaml: not YAML: .*{words}"):
        Config.load(path)


def test_the_config_of_a_run_is_read_as_it_was_written(tmp_path):
    config = load("data.root=2024", f"{GRADIENT}.gamma=[1e-1, 1]", "netsearch.max_params=300k")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    assert from_file(tmp_path, text) == config
