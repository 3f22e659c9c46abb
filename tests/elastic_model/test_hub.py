"""From and to a model hub, here a small server on loopback: revisions, cache, offline, interruptions, pushing."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from elastic_model.provenance import append_stage, read_provenance
from tests.elastic_model.fresh_process import run
from tests.elastic_model.hub_server import TOKEN, HubServer

NAME = "org/elastic-tiny"
ROOT = str(Path(__file__).parents[2])
HERE = f"sys.meta_path.pop(0)\nsys.path.insert(0, {ROOT!r})\n"  # a process of its own, but one that has the package
LOAD = """
import torch
from transformers import AutoModelForSequenceClassification
def load(name, **arguments):
    model = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True, **arguments).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits[0].tolist()
def attempt(name, **arguments):
    try:
        return load(name, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


@pytest.fixture
def hub():
    server = HubServer()
    yield server
    server.close()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 15)[None]).logits[0].tolist()


def shifted(model, by):
    """The same model with other answers, to tell revisions apart."""
    with torch.no_grad():
        model.classifiers.at(model.config.num_hidden_layers).bias.add_(by)
    return model


def reported(process):
    """What a process printed as JSON in its last line."""
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_revisions_cache_and_offline_mode_without_the_package(hub, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "first")
    old = hub.upload(NAME, tmp_path / "first")
    hub.repositories[NAME].refs["v1"] = old
    before = logits_of(tiny_model)
    shifted(tiny_model, 1.0).save_pretrained(tmp_path / "second")
    hub.upload(NAME, tmp_path / "second")
    after = logits_of(tiny_model)
    shifted(tiny_model, 1.0).save_pretrained(tmp_path / "third")
    hub.upload(NAME, tmp_path / "third", branch="trial")

    offline = f"import json\nprint(json.dumps(attempt({NAME!r})))"
    refused = reported(run(LOAD + offline, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1"))
    assert "offline" in refused.lower() or "cached files" in refused, refused

    revisions = ["main", "v1", old, "trial", "never", "main", old]
    code = f"import json\nprint(json.dumps([attempt({NAME!r}, revision=one) for one in {revisions}]))"
    main, tag, commit, branch, missing, *again = reported(run(LOAD + code, tmp_path, HF_ENDPOINT=hub.url))
    assert (main, tag, commit, branch) == (after, before, before, logits_of(tiny_model))
    assert "never is not a valid git identifier" in missing and NAME in missing
    assert again == [main, commit]
    sent = [path for path in hub.downloads() if "file=model.safetensors" in path]
    assert (
        len(sent) == len(set(sent)) == 3
    )  # one for each commit, whatever it is called and however often it is loaded

    hub.requests.clear()
    assert reported(run(LOAD + offline, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")) == after
    assert hub.requests == []


@pytest.mark.slow
def test_an_interrupted_download_never_passes_for_a_whole_one(hub, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    hub.upload(NAME, tmp_path / "model")
    expected = logits_of(tiny_model)
    shifted(tiny_model, 1.0).save_pretrained(tmp_path / "other")
    hub.upload("org/other", tmp_path / "other")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    hub.cuts["model.safetensors"] = size // 3
    code = f"""
import json, urllib.request
from pathlib import Path
from huggingface_hub import constants
def sizes():
    return [file.stat().st_size for file in Path("hf_home").rglob("snapshots/*/model.safetensors")]
first, found = attempt({NAME!r}), sizes()
usual, constants.DOWNLOAD_CHUNK_SIZE = constants.DOWNLOAD_CHUNK_SIZE, 1000  # else nothing of so small a file is kept
resumed = attempt("org/other")
constants.DOWNLOAD_CHUNK_SIZE = usual
urllib.request.urlopen("{hub.url}/test/no-more-cuts", data=b"").close()
print(json.dumps([first, found, resumed, attempt({NAME!r}), sizes()]))
"""
    first, found, resumed, second, whole = reported(run(LOAD + code, tmp_path, HF_ENDPOINT=hub.url))
    assert isinstance(first, str) and found == [], first  # the client gave up, and left nothing under the file's name
    assert resumed == logits_of(tiny_model)
    assert len(hub.resumed) >= 2 and all(0 < start < size for start in hub.resumed)
    assert second == expected and whole == [size, size]


def test_a_stock_checkpoint_of_the_hub_becomes_an_elastic_classifier(hub, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3
    )
    stock = transformers.BertForSequenceClassification(config).eval()
    stock.save_pretrained(tmp_path / "stock")
    card = "---\nlicense: mit\ndatasets:\n- org/some-data\nlanguage: en\n---\n# Stock\n"
    (tmp_path / "stock" / "README.md").write_text(card)
    commit = hub.upload("org/stock-bert", tmp_path / "stock")
    code = f"""
import json
from elastic_model import ElasticBertForSequenceClassification
from elastic_model.card import write_card
from elastic_model.provenance import append_stage
model = ElasticBertForSequenceClassification.from_pretrained("org/stock-bert").eval()
model.save_pretrained("converted")
append_stage("converted", "convert", parent="org/stock-bert")
write_card("converted")
pushed = model.push_to_hub("org/elastic-bert", token={TOKEN!r})
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.arange(5, 15)[None]).logits[0].tolist()))
"""
    logits = reported(run(HERE + LOAD + code, tmp_path, HF_ENDPOINT=hub.url))
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(logits_of(stock)), atol=1e-5, rtol=0)
    (stage,) = read_provenance(tmp_path / "converted")
    assert (stage.parent.hub_id, stage.parent.revision) == ("org/stock-bert", commit)
    card = (tmp_path / "converted" / "README.md").read_text()
    for line in ("license: mit", "base_model: org/stock-bert", "- org/some-data", "- en"):
        assert f"\n{line}\n" in card
    pushed = hub.files("org/elastic-bert")["README.md"].decode()
    assert "\nbase_model: org/stock-bert\n" in pushed and "changes that are not stated" in pushed


def test_pushing_carries_code_tokenizer_and_a_card_that_keeps_to_the_record(hub, tiny_checkpoint, tmp_path):
    append_stage(tiny_checkpoint, "pretrain", seed=7, license="cc-by-4.0")
    (tmp_path / "other.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    code = f"""
from elastic_model import ElasticBertForSequenceClassification
from huggingface_hub import HfApi
from transformers import AutoTokenizer
model = ElasticBertForSequenceClassification.from_pretrained({str(tiny_checkpoint)!r})
tokenizer = AutoTokenizer.from_pretrained({str(tiny_checkpoint)!r})
try:
    model.push_to_hub({NAME!r})
except Exception as error:
    print(type(error).__name__, error)
model.push_to_hub({NAME!r}, tokenizer=tokenizer, token={TOKEN!r}, tags=["tiny"])
model.push_to_hub({NAME!r}, token={TOKEN!r}, revision="trial", commit_message="again")
HfApi(token={TOKEN!r}).upload_file(repo_id={NAME!r}, path_or_fileobj="other.md", path_in_repo="README.md")
with torch.no_grad():
    model.classifiers.at(4).bias.add_(1.0)
model.push_to_hub({NAME!r}, token={TOKEN!r})
"""
    done = run(HERE + LOAD + code, tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "401" in done.stdout  # without the token
    first, *_ = (one for one in hub.repositories[NAME].commits.values() if "README.md" in one)
    needed = {"modeling_elasticbert.py", "configuration_elasticbert.py", "tokenizer.json", "model.safetensors"}
    assert needed <= first.keys()
    card = first["README.md"].decode()
    assert "\nlicense: cc-by-4.0\n" in card and "- tiny\n" in card and f'from_pretrained("{NAME}"' in card
    assert json.loads(first["provenance.json"])["stages"][-1]["seed"] == 7
    assert "changes that are not stated" not in card
    last = hub.files(NAME)
    assert last["README.md"] == (tmp_path / "other.md").read_bytes()  # written by hand: not ours to replace
    assert json.loads(last["provenance.json"])["stages"][-1]["stage"] == "changes that are not stated"
    assert hub.files(NAME, "trial")["model.safetensors"] != last["model.safetensors"]


@pytest.mark.parametrize("kind", ["a class of the user's own", "an adapter"])
def test_what_a_card_cannot_describe_is_pushed_without_one(hub, tiny_checkpoint, tmp_path, kind):
    code = f"""
from elastic_model import ElasticBertForSequenceClassification
class Own(ElasticBertForSequenceClassification):
    pass
model = Own.from_pretrained({str(tiny_checkpoint)!r})
if {kind == "an adapter"}:
    from peft import LoraConfig
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
model.push_to_hub({NAME!r}, token={TOKEN!r})
"""
    done = run(HERE + LOAD + code, tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.files(NAME)
    weights = {"an adapter": "adapter_model.safetensors"}.get(kind, "model.safetensors")
    assert weights in files and "provenance.json" not in files
