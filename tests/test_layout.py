"""Tests mirror the packages: a module's tests are in the file of its name, or in the one that stands here for it."""

from pathlib import Path

import pytest

from tests.test_architecture import MODULES, ROOT

TESTS = ROOT / "tests"
TESTED_IN = {  # modules without a test file of their own, by what uses them
    "schemas/codes.py": "labelers/test_grammar.py",
    "schemas/errors.py": "e2e/test_cli.py",
    "schemas/manifest.py": "pipeline/test_check.py",
    "schemas/options.py": "e2e/test_cli.py",
    "schemas/pages.py": "stats/test_report.py",
    "schemas/remote.py": "stats/test_remote.py",
    "schemas/views.py": "stats/test_views.py",
    "labelers/llm/chat.py": "labelers/llm/test_vllm_chat.py",
    "labelers/llm/client.py": "labelers/llm/test_servers.py",
    "labelers/llm/engine_process.py": "labelers/llm/test_engines.py",
    "labelers/llm/load.py": "labelers/llm/test_transformers_scorer.py",
    "labelers/llm/scorer.py": "labelers/llm/test_transformers_scorer.py",
    "labelers/llm/server_chat.py": "labelers/llm/test_servers.py",
    "pipeline/batches.py": "pipeline/test_check.py",
    "pipeline/corpus/deadletters.py": "pipeline/corpus/test_readers.py",
    "pipeline/corpus/remote.py": "stores/test_corpus.py",
    "pipeline/corpus/sources.py": "pipeline/corpus/test_readers.py",
    "pipeline/corpus/spool.py": "pipeline/corpus/test_readers.py",
    "pipeline/corpus/wikitext/templates.py": "pipeline/corpus/wikitext/test_articles.py",
    "pipeline/decide_graph.py": "pipeline/test_decide.py",
    "pipeline/duplicates.py": "stores/test_folding.py",
    "pipeline/estimate.py": "pipeline/test_cost.py",
    "pipeline/fold.py": "stores/test_folding.py",
    "pipeline/graph.py": "pipeline/test_operations.py",
    "pipeline/handlers.py": "pipeline/test_operations.py",
    "pipeline/identity.py": "e2e/test_label.py",
    "pipeline/label.py": "e2e/test_label.py",
    "pipeline/options.py": "e2e/test_cli.py",
    "pipeline/placement.py": "pipeline/test_operations.py",
    "pipeline/runners/counts.py": "pipeline/test_status.py",
    "pipeline/runners/heartbeat.py": "pipeline/test_operations.py",
    "pipeline/runners/local.py": "e2e/test_label.py",
    "pipeline/runners/packed.py": "pipeline/test_dataflow.py",
    "pipeline/tagging.py": "e2e/test_label.py",
    "pipeline/train_tokenizer.py": "e2e/test_label.py",
    "pipeline/write.py": "stores/test_folding.py",
    "stats/excerpts.py": "stats/test_report.py",
    "stats/figures.py": "stats/test_compute.py",
    "stats/files.py": "stats/test_remote.py",
    "stats/words.py": "stats/test_compute.py",
    "trainer/checkpoint.py": "trainer/test_train.py",
    "trainer/evaluate.py": "trainer/test_train.py",
    "trainer/logs.py": "trainer/test_train.py",
    "trainer/optimizer.py": "trainer/test_train.py",
    "trainer/ranks.py": "trainer/test_train.py",
    "trainer/shards.py": "trainer/test_data.py",
    "cascade/evaluation/options.py": "e2e/test_cli.py",
    "cascade/evaluation/results.py": "cascade/evaluation/test_compare.py",
    "cascade/evaluation/run.py": "e2e/test_cascade.py",
    "cascade/language_model.py": "cascade/test_generate.py",
    "cascade/opening.py": "e2e/test_cascade.py",
    "cascade/options.py": "cascade/test_generate.py",
    "cascade/prompts.py": "e2e/test_cascade.py",
    "lacy/__main__.py": "e2e/test_namespace.py",
    "lacy/api.py": "e2e/test_python.py",
    "lacy/cli.py": "e2e/test_cli.py",
    "lacy/commands/cascade.py": "e2e/test_cascade.py",
    "lacy/commands/label.py": "e2e/test_label.py",
    "lacy/commands/look.py": "stats/test_commands.py",
    "lacy/commands/models.py": "e2e/test_cli.py",
    "lacy/commands/train.py": "e2e/test_train.py",
    "lacy/flags.py": "e2e/test_cli.py",
    "lacy/progress.py": "e2e/test_python.py",
    "lacy/running.py": "e2e/test_cli.py",
    "lacy/tables.py": "pipeline/test_status.py",
}
UNTESTED = {"lacy/demo.py"}  # make demo


@pytest.mark.parametrize("module", sorted(str(path.relative_to(ROOT)) for path in MODULES if path.stem != "__init__"))
def test_a_module_has_its_tests(module):
    own = Path(module).with_name(f"test_{Path(module).name}")
    if module in UNTESTED:
        return
    assert (TESTS / own).exists() != (module in TESTED_IN), "a file of its own, or an entry here"
    assert (TESTS / TESTED_IN.get(module, own)).exists()


def test_the_table_has_no_other_modules():
    assert {ROOT / module for module in TESTED_IN.keys() | UNTESTED} <= set(MODULES)
