"""Every module of the package has a test of its name, or the table here says where it is tested."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "fastbert"

# Modules without a namesake, by the file that tests them.
ELSEWHERE = {
    "benchmarks/test_tune.py": "kernels.py",
    "checkpoint/test_checkpoint.py": "checkpoint.py",
    "checkpoint/test_refusals.py": "check.py",
    "config/test_options.py": "config/finetune.py config/pretrain.py config/presets.py"
    " cli/options.py cli/training.py",
    "data/masking/test_mlm.py": "data/masking/philox.py",
    "data/masking/test_noising.py": "data/tokenized/ngrams.py",
    "data/text/test_corpus.py": "data/text/files.py data/text/python_docs.py",
    "embedding/test_embedder.py": "embedding/model.py",
    "embedding/test_refusals.py": "embedding/plan.py",
    "embedding/test_shards.py": "embedding/progress.py embedding/writers.py",
    "export/test_export.py": "export/check.py export/formats.py export/plain.py",
    "finetune/test_commands.py": "cli/use.py",
    "finetune/test_features.py": "finetune/choice.py finetune/questions.py",
    "finetune/test_formats.py": "data/formats/conll.py data/formats/squad.py data/formats/tables.py"
    " finetune/tokens.py",
    "finetune/test_metrics.py": "finetune/squad_metrics.py",
    "finetune/test_reading.py": "finetune/sequences.py finetune/task.py",
    "finetune/test_tasks.py": "finetune/infer.py finetune/predict.py finetune/report.py",
    "hf/test_attention_interface.py": "hf/attention.py",
    "hf/test_contract.py": "models/inputs.py models/request.py",
    "hf/test_differences.py": "hf/stack.py",
    "hf/test_lifecycle.py": "hf/classes.py",
    "hf/test_patch.py": "hf/encode.py hf/families.py hf/heads.py",
    "hf/test_users_tables.py": "modules/embeddings.py",
    "models/test_against_hugging_face.py": "models/bert.py models/pretraining.py reference.py",
    "models/test_elsewhere.py": "models/base.py",
    "models/test_forward_options.py": "models/tables.py",
    "models/test_from_pretrained.py": "models/arguments.py",
    "models/test_rows.py": "models/losses.py modules/sequences.py",
    "models/test_users_modules.py": "models/users.py modules/users.py",
    "modules/graphs/test_buckets.py": "modules/graphs/call.py modules/graphs/replays.py"
    " modules/stack.py",
    "modules/test_encoder.py": "modules/layer.py",
    "modules/test_plan.py": "modules/bert_layer.py",
    "modules/whole_layer/test_results.py": "modules/whole_layer.py",
    "ops/attention/test_attention.py": "ops/attention.py",
    "ops/attention/test_attention_plain.py": "ops/attention_plain.py",
    "ops/embedding/test_embedding.py": "ops/embedding.py",
    "ops/layer_norm/test_layer_norm.py": "ops/layer_norm.py",
    "ops/linear_cross_entropy/test_linear_cross_entropy.py": "ops/linear_cross_entropy.py",
    "ops/test_fp8_linear.py": "ops/fp8_plain.py",
    "ops/test_inference.py": "ops/fused.py",
    "serve/test_batcher.py": "serve/metrics.py serve/refusal.py",
    "serve/test_embeddings.py": "serve/loading.py serve/openai.py",
    "serve/test_limits.py": "config/serve.py serve/app.py serve/gate.py serve/requests.py"
    " serve/server.py",
    "serve/test_tasks.py": "fill_mask.py models/trained.py serve/abilities.py serve/predictions.py"
    " serve/routes.py serve/service.py",
    "system/test_files.py": "system/console.py system/locks.py",
    "test_docs.py": "_version.py",
    "test_explain.py": "events.py",
    "train/prepare/test_prepare.py": "train/prepare.py",
    "train/prepare/test_run_directory.py": "train/run_directory.py",
    "train/test_distributed.py": "train/evaluate.py",
    "train/test_objective.py": "train/recipe.py",
    "train/test_pretrain.py": "cli/about.py cli/app.py train/profiling.py",
    "train/test_step.py": "train/precision.py",
}


def test_each_module_has_a_test_of_its_name_or_a_line_in_the_table():
    modules = {
        file.relative_to(PACKAGE)
        for file in PACKAGE.rglob("*.py")
        if not file.name.startswith("__")
    }
    without = {
        module.as_posix()
        for module in modules
        if not (TESTS / module.with_name(f"test_{module.name}")).exists()
    }
    told = [module for others in ELSEWHERE.values() for module in others.split()]
    assert len(told) == len(set(told))
    assert set(told) == without


def test_the_files_of_the_table_exist():
    assert not [file for file in ELSEWHERE if not (TESTS / file).is_file()]


def test_no_test_imports_another_test():
    for file in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                *folders, last = name.split(".")
                is_test = last == "conftest" or last.startswith("test_")
                assert not (folders[:1] == ["tests"] and is_test), f"{file} imports {name}"
