"""Full weights in one step: no adapter, the model's own layers move once, and the folder holds a whole model.

python examples/full_weights.py                        # the encoder comes from the Hub
python examples/full_weights.py --model path/to/encoder
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import pipeline

from onestep_peft import OneStepConfig, OneStepTrainer

MESSAGES = Path(__file__).parent / "data" / "customer_messages"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a Hub id or a folder")
parser.add_argument("--dataset", default=str(MESSAGES), help="a Hub id or a folder, with three splits")
parser.add_argument("--output-dir", default="onestep_output", help="where the model goes; must not hold a run")
arguments = parser.parse_args()

rows = load_dataset(arguments.dataset)
trainer = OneStepTrainer(
    model=arguments.model,
    args=OneStepConfig(output_dir=arguments.output_dir, method="full"),  # all that differs from an adapter
    train_dataset=rows["train"],
    search_dataset=rows["validation"],
    eval_dataset=rows["test"],
)
trainer.train()
print(trainer.report.table())
print(trainer.report.summary())
trainer.save_model()

# A plain transformers model: the folder needs neither its base nor this package.
classify = pipeline("text-classification", model=arguments.output_dir, tokenizer=arguments.output_dir)
for text in ("why was I charged twice??", "Could you send the invoice again, please?"):
    print(classify(text)[0]["label"], "<-", text)
