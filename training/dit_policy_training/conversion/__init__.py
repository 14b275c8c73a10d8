"""Recordings to LeRobot datasets: read, sampled, cut into episodes, written, checked, shown. No ROS needed.

A map, in the way of the data:

- asked for: options, checking, settings (what changes a result), layout (what a row is)
- read: recording, bag_files, storage (mcap_file, sqlite_file), message, message_types
- sampled: sampling, feeds (where messages go), times (clocks, silences), streams, observations, actions (commands,
  vectors, depth), tasks, episodes (annotations, idle), takes (rows to episodes),
  rows, account (what is to say of a bag)
- written: shards, pictures, videos, encoders, yuv, depth_codes, stats, lerobot_format, evidence (for the check);
  merging
- run: running, jobs, workers, ray_cluster, bag_to_shard, manifest, assembling, locking, interrupts, disk, progress
- checked: verify, reloaded, verify_pictures, verify_packets, verify_statistics, likeness, findings
- shown: report, report_figures, report_warnings, report_page, report_plots, report_pictures, report_style
- beside it: inspection, guessing, lacking (the command inspect); replay (the command to_bag)
"""
