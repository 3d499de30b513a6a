"""NNCodec: ISO/IEC 15938-17, steps by a quantization parameter (qp) and an arithmetic coder.

All parameters are in its bitstream, biases too; each candidate is decoded from one, and costs its
bytes. A qp is swept for all weights together, quantization dependent (a trellis) or not, with and
without a price for bits. Left out are its search of a qp per tensor by inference (ioq), and its
codebooks, which exclude the trellis.
"""

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
from nncodec import nnc

from benchmarks.peers.exchange import Candidate, Decoded, Failure, Question, answer

QPS = range(-31, -14)  # four of them double the step
# its defaults; the price that it takes for a bit's own, and a quarter of the weights' step for
# what is no weight, which 0 stands for
WAYS = (
    {"nonweight_qp": -75, "lambda_scale": 0},
    {"nonweight_qp": 0, "lambda_scale": 1},
)


def search(question: Question) -> Iterator[Candidate | Failure]:
    named = question.network.named_parameters()
    original = {name: values.detach().numpy() for name, values in named}
    for way, dependent, qp in product(WAYS, (True, False), QPS):
        yield coded(original, qp=qp, use_dq=dependent, **way)


def coded(original: dict[str, np.ndarray], **options: int) -> Candidate:
    """The parameters as they are decoded from the bitstream that they are coded in."""
    stream = nnc.compress(
        original, bitstream_path=None, return_bitstream=True, row_skipping=True, **options
    )
    decoded = nnc.decompress(stream)
    assert {name: values.shape for name, values in decoded.items()} == {
        name: values.shape for name, values in original.items()
    }
    weights = {name: Decoded(torch.from_numpy(values)) for name, values in decoded.items()}
    return Candidate(str(options), weights, stream_bytes=len(stream))


if __name__ == "__main__":
    answer(search)
