-- Log one invalidation and publish it, in one atomic step. Then it is accepted.
--
-- KEYS  head      hash {epoch, seq, digest, digest_seq} of the namespace; `digest` is the SHA-1 of the frame at
--                 `digest_seq`. The two sequences differ only after a writer that does not keep the digest.
--       log       stream; the id of an entry is <seq>-0, its one field `f` is the frame as it was published
--       receipt   the result of this script for this id and scope, kept for a while so that a retry is logged once
-- ARGV  channel
--       epoch     used only when the namespace has none: an epoch and its sequence begin and end together
--       log length (about this many entries are kept), receipt lifetime in ms
--       fingerprint of the targets: the same id with other targets is an error, not a retry
--       PUBLISH, or in a cluster SPUBLISH
--       tails     one or more frames without their head, `"id":…}`
--
-- Returns {epoch, seq of the last frame, receivers of the last message, 1 when it had been logged before,
--          the fingerprint it was logged with}.

local head, log, receipt = KEYS[1], KEYS[2], KEYS[3]
local channel, log_length, receipt_ms, fingerprint, publish = ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local before = redis.call('GET', receipt)
if before then
  local epoch, seq, receivers, print_before = before:match('^(%S+) (%d+) (%d+) (%S*)$')
  return {epoch, tonumber(seq), tonumber(receivers), 1, print_before}
end

local function frame_at(epoch, seq, tail)
  return '{"v":1,"epoch":"' .. epoch .. '","seq":' .. string.format('%.0f', seq) .. ',' .. tail
end

local at = redis.pcall('HMGET', head, 'epoch', 'seq')
if at.err and not at.err:find('WRONGTYPE') then
  return redis.error_reply(at.err)
end
local epoch, seq = at[1], at[2]
-- A value that another program wrote, and that is no position in a log, is not a head.
local is_head = epoch and epoch:match('^[%w._-]+$') and seq and seq:match('^%d+$') and tonumber(seq) < 2 ^ 53 - 1
seq = is_head and tonumber(seq)
if not is_head then
  if at.err or epoch then
    redis.call('DEL', head)
  end
  epoch, seq = ARGV[2], 0
  -- A server out of memory refuses a script at its first write only: so the first write is one that needs memory.
  redis.call('HSET', head, 'epoch', epoch, 'seq', 0)
  -- Entries of a lost epoch must not be taken for entries of this one: sequences begin again at 1.
  redis.call('DEL', log)
end

local receivers
for i = 7, #ARGV do
  seq = seq + 1
  local number = string.format('%.0f', seq)
  local frame = frame_at(epoch, seq, ARGV[i])
  local added = redis.pcall('XADD', log, 'MAXLEN', '~', log_length, number .. '-0', 'f', frame)
  local is_refused = type(added) == 'table' and added.err
  if is_refused and not (added.err:find('WRONGTYPE') or added.err:find('equal or smaller')) then
    return redis.error_reply(added.err)
  end
  if is_refused then
    -- The log has an entry of another writer at this sequence or beyond, or is no stream; or the head was moved back,
    -- and this sequence was assigned before. Begin a new log with a new epoch: replicas drop everything.
    epoch, seq, number = ARGV[2], 1, '1'
    frame = frame_at(epoch, seq, ARGV[i])
    redis.call('DEL', log)
    redis.call('XADD', log, 'MAXLEN', '~', log_length, '1-0', 'f', frame)
  end
  -- Before the message: if PUBLISH is refused, replicas find with their next echo that they are behind the head.
  redis.call('HSET', head, 'epoch', epoch, 'seq', number, 'digest', redis.sha1hex(frame), 'digest_seq', number)
  receivers = redis.call(publish, channel, frame)
end

redis.call('SET', receipt, epoch .. ' ' .. string.format('%.0f', seq) .. ' ' .. receivers .. ' ' .. fingerprint,
           'PX', receipt_ms)
return {epoch, seq, receivers, 0, fingerprint}
