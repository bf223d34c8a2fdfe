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
--          the fingerprint it was logged with}; and, when it was logged and could not be published, the refusal.
-- An error means that nothing was logged.

local head, log, receipt = KEYS[1], KEYS[2], KEYS[3]
local channel, log_length, receipt_ms, fingerprint, publish = ARGV[1], ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local before = redis.call('GET', receipt)
if before then
  local epoch, seq, receivers, print_before = before:match('^(%S+) (%d+) (%d+) (%S*)$')
  return {epoch, tonumber(seq), tonumber(receivers), 1, print_before}
end

-- A server checks rights command by command, and does not undo what a script has written before it was refused. So all
-- rights are checked before the first write.
local function no_right(command, to)
  return redis.error_reply("NOPERM this user has no permissions to run the '" .. command:lower() ..
                           "' command, or to access the " .. to .. "; nothing was logged")
end

if redis.acl_check_cmd then
  local may = redis.acl_check_cmd
  if not may('XADD', log, '*', 'f', '') then return no_right('xadd', 'key ' .. log) end
  if not may('HSET', head, 'seq', '0') then return no_right('hset', 'key ' .. head) end
  if not may('DEL', log) then return no_right('del', 'key ' .. log) end
  if not may('SET', receipt, '', 'PX', '1') then return no_right('set', 'key of the receipt') end
  if not may(publish, channel, '') then return no_right(publish, 'channel ' .. channel) end
else
  -- Redis 6 checks the rights to a command before its arguments. Each of these commands changes nothing.
  local function is_denied(command, ...)
    local answer = redis.pcall(command, ...)
    return type(answer) == 'table' and answer.err and answer.err:find('The user executing the script', 1, true)
  end
  if is_denied('XADD', log, '0-0', 'f', '') then return no_right('xadd', 'key ' .. log) end
  if is_denied('DEL', receipt) then return no_right('del', 'key of the receipt') end
  if is_denied('SET', receipt, '', 'PX', '0') then return no_right('set', 'key of the receipt') end
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
elseif not redis.acl_check_cmd then
  redis.call('HSET', head, 'seq', at[2]) -- changes nothing, and is refused here if it would be refused below
end

local receivers, unpublished
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
  -- Before the message: if PUBLISH is refused, replicas find with their next echo that they are behind the head. Only
  -- Redis 6 can refuse it here.
  redis.call('HSET', head, 'epoch', epoch, 'seq', number, 'digest', redis.sha1hex(frame), 'digest_seq', number)
  receivers = redis.pcall(publish, channel, frame)
  if type(receivers) == 'table' then
    receivers, unpublished = 0, receivers.err
  end
end

redis.call('SET', receipt, epoch .. ' ' .. string.format('%.0f', seq) .. ' ' .. receivers .. ' ' .. fingerprint,
           'PX', receipt_ms)
return {epoch, seq, receivers, 0, fingerprint, unpublished}
