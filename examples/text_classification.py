"""Text classification in one step: fit the head, move a LoRA adapter once, save it, load it, predict.

python examples/text_classification.py                        # the encoder comes from the Hub
python examples/text_classification.py --model path/to/encoder
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from transformers import pipeline

from onestep_peft import OneStepConfig, OneStepTrainer, load

MESSAGES = Path(__file__).parent / "data" / "customer_messages"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a Hub id or a folder")
parser.add_argument("--dataset", default=str(MESSAGES), help="a Hub id or a folder, with three splits")
parser.add_argument("--output-dir", default="onestep_output", help="where the adapter goes; must not hold a run")
arguments = parser.parse_args()

rows = load_dataset(arguments.dataset)
trainer = OneStepTrainer(
    model=arguments.model,  # or a model that you loaded, with processing_class=tokenizer
    args=OneStepConfig(output_dir=arguments.output_dir),
    train_dataset=rows["train"],  # gives the direction
    search_dataset=rows["validation"],  # gives the distance, and may refuse the step
    eval_dataset=rows["test"],  # only reports
    peft_config=LoraConfig(r=8),
    metrics=["accuracy", "f1"],
)
trainer.train()
print(trainer.report.table())
print(trainer.report.summary())
trainer.save_model()

model, tokenizer = load(arguments.output_dir)
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
for text in ("why was I charged twice??", "Could you send the invoice again, please?"):
    print(classify(text)[0]["label"], "<-", text)
