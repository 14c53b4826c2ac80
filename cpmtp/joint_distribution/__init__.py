"""The exact joint distribution of the next n tokens, and what may be given in its place."""

from cpmtp.joint_distribution.dense import JointDistribution as JointDistribution
from cpmtp.joint_distribution.exact import DEFAULT_MAX_BYTES as DEFAULT_MAX_BYTES
from cpmtp.joint_distribution.exact import check_context as check_context
from cpmtp.joint_distribution.exact import check_joint_size as check_joint_size
from cpmtp.joint_distribution.exact import checked_log_probs as checked_log_probs
from cpmtp.joint_distribution.exact import conditional_log_probs as conditional_log_probs
from cpmtp.joint_distribution.exact import conditional_probs as conditional_probs
from cpmtp.joint_distribution.exact import exact_joint as exact_joint
from cpmtp.joint_distribution.exact import grid_rows as grid_rows
from cpmtp.joint_distribution.exact import next_token_log_probs as next_token_log_probs
from cpmtp.joint_distribution.exact import prefixes_at_once as prefixes_at_once
