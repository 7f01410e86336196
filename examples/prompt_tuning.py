"""Prompt tuning in one pass: a few virtual tokens before every message move, the model itself never.

They start as the tokens of a text (`--prompt`) that says what is asked for, and go far from it in small steps (with
`OneStepConfig(slices=1)` a single step stays near it). A prompt is the smallest adapter there is (13 vectors here), and
on a small encoder it gains less than a LoRA: see text_classification.py.

python examples/prompt_tuning.py                        # the encoder comes from the Hub
python examples/prompt_tuning.py --model path/to/encoder
"""

import argparse
from pathlib import Path

from datasets import load_dataset
from peft import PromptTuningConfig
from transformers import AutoTokenizer, pipeline

from onestep_peft import OneStepConfig, OneStepTrainer, load

MESSAGES = Path(__file__).parent / "data" / "customer_messages"
PROMPT = "complaint, praise, question, request, cancellation or spam:"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="a Hub id or a folder")
parser.add_argument("--dataset", default=str(MESSAGES), help="a Hub id or a folder, with three splits")
parser.add_argument("--prompt", default=PROMPT, help="the text that the virtual tokens start as")
parser.add_argument("--output-dir", default="onestep_output", help="where the prompt goes; must not hold a run")
arguments = parser.parse_args()

rows = load_dataset(arguments.dataset)
words = AutoTokenizer.from_pretrained(arguments.model)(arguments.prompt, add_special_tokens=False)["input_ids"]
trainer = OneStepTrainer(
    model=arguments.model,
    args=OneStepConfig(output_dir=arguments.output_dir),
    train_dataset=rows["train"],
    search_dataset=rows["validation"],
    eval_dataset=rows["test"],
    peft_config=PromptTuningConfig(
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=arguments.prompt,
        num_virtual_tokens=len(words),
        tokenizer_name_or_path=arguments.model,
    ),
)
trainer.train()
print(trainer.report.table())
print(trainer.report.summary())
trainer.save_model()

model, tokenizer = load(arguments.output_dir)
classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
for text in ("why was I charged twice??", "Could you send the invoice again, please?"):
    print(classify(text)[0]["label"], "<-", text)
