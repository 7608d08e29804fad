# SPDX-License-Identifier: Apache-2.0
"""What a runbook needs around the verbs."""
