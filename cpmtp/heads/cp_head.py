"""The head of the paper: a `DraftHead`, whose form is ``cp`` unless another is named."""

from cpmtp.heads.draft_head import DraftHead

CPHead = DraftHead
