"""A causal language model in one step: it learns what to say after a weather report, and how.

A row is a `prompt` and a `completion`; only the completion is learnt. Rows with one `text`, or with `messages` for a
tokenizer with a chat template, need no other setting.

python examples/causal_language_model.py                        # the model comes from the Hub
python examples/causal_language_model.py --model path/to/model
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from transformers import pipeline

from onestep_peft import OneStepConfig, OneStepTrainer, load

WEATHER = Path(__file__).parent / "data" / "weather_advice"
PROMPT = "Weather: Light snow, -2 degrees.\nMum says:"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="a Hub id or a folder")
parser.add_argument("--dataset", default=str(WEATHER), help="a Hub id or a folder, with splits train and test")
parser.add_argument("--output-dir", default="onestep_output", help="where the adapter goes; must not hold a run")
arguments = parser.parse_args()


def say(model, tokenizer=None) -> str:
    """The model's likeliest answer to one more weather report."""
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return write(PROMPT, max_new_tokens=40, do_sample=False, return_full_text=False)[0]["generated_text"].strip()


rows = load_dataset(arguments.dataset)
print("before:", say(arguments.model))
trainer = OneStepTrainer(
    model=arguments.model,
    task="text-generation",
    # Nothing but the training rows chooses here; of few rows a larger share is held out for that.
    args=OneStepConfig(output_dir=arguments.output_dir, search_fraction=0.25),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
)
trainer.train()
print(trainer.report.table())
print(trainer.report.summary())
trainer.save_model()

print("after:", say(*load(arguments.output_dir)))
