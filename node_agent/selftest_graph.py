"""The self-test's expert: an ONNX graph of a few kilobytes and what it must compute, so that a board needs no onnx package.

The graph is that of quantize.expert_graph (4-bit MatMulNBits of block 32, accuracy_level 4; D=64, I=32) with weights of a
pattern that compresses: code[n, k] = (a n + b k + (n k mod 5)) mod 16, scale 0.02 + 0.002 (n mod 4), zero point 8; a, b are
7, 3 for gate_up [64, 64] and 5, 11 for down [64, 32]. Leaves out: who runs it (selftest.py).
"""

from __future__ import annotations

import base64
import zlib

# Row x[k] = ((37 k) mod 101 - 50) / 50, k < 64, and y of the float64 formula down(silu(gate x) * up x) on the dequantized weights.
EXPECTED = tuple(
    float(text)
    for text in """
    -0.1785 0.0439 0.0368 -0.0596 0.0748 -0.0001 -0.1112 -0.0148 -0.0215 -0.0449 -0.0513 0.1916 -0.1646 0.0499
    0.0119 0.0041 0.016 0.0446 -0.0159 -0.1811 0.0668 -0.0692 -0.1194 0.1343 0.0052 -0.0638 0.0409 -0.0359 -0.0681
    0.0143 0.0623 -0.2572 -0.0187 0.0684 -0.0521 -0.2904 0.031 0.0151 -0.1975 0.0625 0.0709 -0.1458 0.0585 0.0614
    -0.0001 -0.0795 0.1145 -0.0444 0.0024 -0.0422 -0.0116 -0.0691 0.0305 -0.0618 -0.2151 0.0321 0.0308 -0.1402
    0.0724 -0.0609 -0.0691 0.0568 0.0555 -0.1443
    """.split()
)
GRAPH = (
    "eNrtl3k4VGscx50xMV7bmIiUSOVqKqXNpYU7LTSiREUqjTExHEZmjvUqlahIWkSLS5urhZs2aeNqk1bR4mp1tUmrtEnumWPc85o5zfx1/7n3zvOc"
    "53fe9zxzzuf5vN9zfucwgENKP5COACQaaAXyJAI/LNxmEdDt3BXzeaiAhQSZaspmLLXdeBI3DHXnCCViNgMgriZOuQhNuufesWcE9Hh8PhbB48f4"
    "oYJIAWpCl05rA7o//peOgQEA/qiIH+InFsYKTCzwKQddvijUJlTIjxCJRQslYA5Aglja4ihhIIrZSK/N0pINsHBTHdmuOBwVSiy7eUoL2xDQedFC"
    "sUl75w+RXokFtMOwUD8RJgnH8KvT8DngAbqcuHMgFqKYKZANeHyJpZYHJuSHOAtQjK0PuvHQ8CCekZpagmMugsjjDgbwWQDJykJ4f58zFEMt1XF3"
    "IBn3zQMaAaKoMFw2IKrMdIwpXTqk0GzxD2hmIQL2JibDiUFjMJk0DpkAbgJz2KavM471kfzxvVrsGNjon2E2qcJJ3Novz8ajFknUcSx+7d9olnHF"
    "qaJVPH7lvYgLvReemL77y8TN45ffsYzqzTuqNvPLtI2vRtwZEnH5yOAJx/tuAH2z9Bc904986Xf+pdelcbsuDd/Ta9keZvLnBWOxEk6SqWemRcAn"
    "W0yPc8vcs8nicJttpd76OvP8pvAS/sWhK1789Kvu92qj/xazjAqn6FZxns2sWo9EnZHFjv6NrAwzp4o34labPN4Jtd1fpm1+tfzOkKjLvKPaM/dO"
    "2/h8xMohERcMFmpP393+zC/ypdf5cV6Xhu/qNXwPc9lnZvK3Bbe/Ce66H7k74fjgDaL8JqzELanSM3NQQL4tpsVJMvd8ahHQZntOj1NnvrNJhb5h"
    "Mk37bPJqPVbpJCrolGkyOKo9fW/7xucKOmWakr8JbrsL7k5Q0CnT1JZUOT+zLiBfQacKfXyZpvsetTqJJx2LFXTKNE18Pn75PcsLvRV0yjQd75sF"
    "FmXpRyrolGmyKGlbWqmXWaegU4W+TdSpI3VSp47USZ06Uid16kidKvRdpE4dqZM6daRO6tSROqlTR+pUoe8rdepIndSpI3VSp47USZ06UqcKfUOp"
    "U0fqpE4dqZM6daRO6tSROlXom0GdOlIndepIndSpI3VSp47UqULfCurUkTqpU0fqpE4dqZM6daROFfqOKWkdhE4lrYPQqaR1EDqVtA5Cpwp9L5S0"
    "DkKnktZB6FTSOgidSloHoVOFvj5KWgehU0nrIHQqaR2ETnYWXfpiwEQ4Xd8GuQl0cHvnWOnmbX+Y2PK2niW29201xPb/8X/3cfYGBh4NhHhnlL3F"
    "chMYB3r8fOPHX97P6axG2edcyprjdloVVvkspaeWxp7teVrde8fHbY9GJ9yMvWb4YHJojeup/q4HB26lDUzXjBkZX8RNY/nmWKNv7OM1uPen/NYt"
    "5Pcf1vzZWQut5lf5pNLHltoF15tmG7moz9vhvO3RmIQBsdd6hql7FwQ9+BBaM/lUjevB/lsPDkynXdHgVhvva7AuallVrpFTHdgFDq92pU+D6yHI"
    "bU/GXB8AQb4NWvshFIKclVON5kKQXeDwWuYS3hwHQQ5YclZ4GoJc/dZk7QcI8rU12mIPQXaBw6tPlVYqHYI8zZj3zhmC7L56u8laCDK6qCWtHILs"
    "AofX+uD1RtkQpPO6JynXIcj93R22m0CQCDfN2BeClFveA3HNgwqtIMjr7CWGQghy1P4zDtshyC3VxrkNEKTc8k6hpx62K4UghYcYBe8gyKuj5p5x"
    "gCD7obn28RCk3PLeyDZyK3OBIN9NXTc6BYKcffXx3DMQ5MkW+3INCFJueUOsCm/5VEGQKTfZ1wwhyIezFz+eC0FOSiv3zYEg5Zb3famdqD4YgjQM"
    "O+RdAEHGPNRc/BiCvG/s22ANQcot7xqXsk9xzRBkwcepj0ZDkLSYdM3FEGRgbkN8EQQpt7w9Ou5aErLjriUhO+5aEpKdQZM+FfCGAX3RchNonU+S"
    "zifIf208xxAg0Sx9oMtAWFpAnYV4AVyUPz4bozDLoQM1phHHAHT9TmcifwGg0VF4"
)


def onnx_bytes() -> bytes:
    """The graph x float32 [T, 64] -> y float32 [T, 64]."""
    return zlib.decompress(base64.b64decode(GRAPH))
