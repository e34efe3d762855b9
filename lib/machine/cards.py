"""Graphics cards that are not in this machine: their memory, and what fraction of their peak trainings have reached."""
import re
from dataclasses import dataclass

from configurator import UserError
from lib.machine.device import PEAK_TFLOPS

# GB (10**9 bytes). If a card is sold with several sizes, the smaller one; plan.py --memory=80 sets another.
MEMORY_GB = {
    'B200': 180, 'GH200': 96, 'H200': 141, 'H800 PCIe': 80, 'H800': 80, 'H20': 96, 'H100 PCIe': 80, 'H100 NVL': 94,
    'H100': 80, 'A100': 40, 'A800': 40, 'A40': 48, 'L40S': 48, 'L40': 48, 'RTX 6000 Ada': 48, 'A6000': 48, 'L20': 48,
    'L4': 24, 'A10G': 24, 'A10': 24, 'T4': 16, 'V100': 16, 'MI300X': 192, 'GTX 1080 Ti': 11, 'GTX 1080': 8,
    'GTX 1070 Ti': 8, 'GTX 1070': 8, 'GTX 1060': 6, 'GTX 1050 Ti': 4, 'GTX 1050': 2, 'RTX 2080 Ti': 11,
    'RTX 2080 SUPER': 8, 'RTX 2080': 8, 'RTX 2070 SUPER': 8, 'RTX 2070': 8, 'RTX 2060 SUPER': 8, 'RTX 2060': 6,
    'RTX 3090 Ti': 24, 'RTX 3090': 24, 'RTX 3080 Ti': 12, 'RTX 3080': 10, 'RTX 3070 Ti': 8, 'RTX 3070': 8,
    'RTX 3060 Ti': 8, 'RTX 3060': 12, 'RTX 4090 D': 24, 'RTX 4090': 24, 'RTX 4080 SUPER': 16, 'RTX 4080': 16,
    'RTX 4070 Ti SUPER': 16, 'RTX 4070 Ti': 12, 'RTX 4070 SUPER': 12, 'RTX 4070': 12, 'RTX 4060 Ti': 8, 'RTX 4060': 8,
    'RTX 5090': 32, 'RTX 5080': 16, 'RTX 5070 Ti': 16, 'RTX 5070': 12, 'RTX 5060 Ti': 8, 'RTX 5060': 8,
}


@dataclass(frozen=True)
class Row:
    """A training that was timed. mfu: the fraction of the card's dense peak that the model's FLOPs made up."""
    card: str
    parameters: float
    mfu: float
    source: str


# Published or reported speeds, turned into a fraction of PEAK_TFLOPS with the FLOPs of model.flops_per_token.
MEASURED = (
    Row('H200', 124e6, 0.42, 'modded-nanogpt track 3, 488k tokens/s'),
    Row('H100', 124e6, 0.38, 'modded-nanogpt track 3 on 8 cards, 436k tokens/s each'),
    Row('A100', 124e6, 0.29, "nanoGPT's README: 300B tokens in about 4 days on 8 cards"),
    Row('A100', 10.7e6, 0.10, "nanoGPT's README: 5,000 updates of 16,384 tokens in about 3 minutes"),
    Row('RTX 4090', 124e6, 0.55, 'nanoGPT issue 182, 29 % of an A100'),
    Row('RTX 3090', 124e6, 0.66, "a reader's 4,000 updates of 491,520 tokens in about 10 hours"),
    Row('GTX 1060', 10.7e6, 0.73, "a tutorial's 5,000 updates of 16,384 tokens in about 30 minutes"),
)
UNKNOWN = Row('', 0, 0.30, 'a guess, since no timed training is known for this card')


def find_card(text):
    """Return the key of PEAK_TFLOPS that `text` means: a100, 3090, "gtx 1060", rtx4090; UserError if none."""
    def squeezed(name):
        return re.sub(r'[^a-z0-9]', '', name.lower())
    wanted = squeezed(text)
    for fits in (lambda name: name == wanted, lambda name: name.removeprefix('rtx').removeprefix('gtx') == wanted):
        for card in PEAK_TFLOPS:
            if fits(squeezed(card)):
                return card
    raise UserError(f'on={text!r}: expected here, or one of {", ".join(sorted(PEAK_TFLOPS))} (also as 3090)')


def mfu_of(card, parameters):
    """Return the Row to expect for a model of that many parameters on `card`: the card's row nearest in size.

    Without a row of the card it is UNKNOWN. Rows for a model over three times as large or small are only a guess, too,
    which the text says.
    """
    rows = [row for row in MEASURED if row.card == card]
    if not rows:
        return UNKNOWN
    row = min(rows, key=lambda row: max(row.parameters, parameters) / min(row.parameters, parameters))
    far = not 1 / 3 < row.parameters / parameters < 3
    return Row(row.card, row.parameters, row.mfu, row.source + '; another model size' * far)
