"""Token classification in one step: from where, to where and when, in requests of travellers.

A row is a list of words (`tokens`) and a tag for each (`ner_tags`), by name or by number.

python examples/token_classification.py                        # the encoder comes from the Hub
python examples/token_classification.py --model path/to/encoder
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import pipeline

from onestep_peft import OneStepConfig, OneStepTrainer, load

REQUESTS = Path(__file__).parent / "data" / "travel_requests"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a Hub id or a folder")
parser.add_argument("--dataset", default=str(REQUESTS), help="a Hub id or a folder, with splits train and test")
parser.add_argument("--output-dir", default="onestep_output", help="where the adapter goes; must not hold a run")
arguments = parser.parse_args()

rows = load_dataset(arguments.dataset)
trainer = OneStepTrainer(
    model=arguments.model,
    # Nothing but the training rows chooses here; of few rows a larger share is held out for that.
    args=OneStepConfig(output_dir=arguments.output_dir, search_fraction=0.25),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
)
trainer.train()
print(trainer.report.table())
print(trainer.report.summary())
trainer.save_model()

model, tokenizer = load(arguments.output_dir)
find = pipeline("token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first")
request = "A seat from Bratislava to Vienna on Thursday evening, please."
print(request)
for found in find(request):
    print(f"  {found['entity_group']:12}{found['word']}")
